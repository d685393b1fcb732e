"""Pagehold as it is used: `pagehold up`, all its processes, and a client that streams over gRPC."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from peers_lib.contestant import PREFIX_CACHE
from peers_lib.job import Job
from peers_lib.recording import Recording, play
from peers_lib.requestfile import Request
from peers_lib.server import Server, free_port
from peers_lib.trace import Trace
from peers_lib.worker import EngineError, main

SERVICE: Final = "pagehold.v1.InferenceService"
_SEQUENCES: Final = 128  # at once, of `pagehold up` by default


def _message(request: Request) -> api.GenerateRequest:
    message = api.GenerateRequest(request_id=request.id)
    message.token_ids.ids.extend(request.prompt_token_ids)
    message.sampling.temperature = 0.0
    message.sampling.seed = request.seed
    message.stopping.max_tokens = request.max_tokens
    message.stopping.ignore_eos = request.ignore_eos
    return message


def flags(job: Job, address: str) -> list[str]:
    """Of `pagehold up`. Those of the job come last and so prevail."""
    found = [
        f"--model={job.model}",
        f"--dtype={job.dtype}",
        f"--listen={address}",
        f"--state-dir={job.shared}/state",
        f"--kv-memory={job.kv_memory}",
        f"--max-num-seqs={max(job.most, _SEQUENCES)}",
        "--log-level=warning",
    ]
    if PREFIX_CACHE not in job.flags:
        found.append(f"--no-{PREFIX_CACHE}")
    return [*found, *(f"--{flag}" for flag in job.flags)]


class Pagehold:
    """The worker is only the client: memory and start-up are those of the tree below `pagehold up`."""

    version = metadata.version("pagehold")

    def __init__(self, found_root: Callable[[int], None]) -> None:
        self._found_root = found_root
        self._address = f"127.0.0.1:{free_port()}"
        self._server: Server | None = None

    @property
    def root(self) -> int:
        return self._server.pid if self._server else 0

    @property
    def started(self) -> float | None:
        return self._server.started if self._server else None

    def start(self, job: Job) -> None:
        # Not the installed command, which may belong to another checkout.
        command = [sys.executable, "-m", "services.cli.main", "up", *flags(job, self._address)]
        self._server = Server(command, Path(job.scratch) / "up.log")
        self._found_root(self._server.pid)
        with grpc.insecure_channel(self._address, options=[("grpc.max_reconnect_backoff_ms", 100)]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            self._server.wait(lambda: self._serving(health), job.timeout)

    def _serving(self, health: Any) -> bool:
        try:
            answer = health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=1.0)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def prepare(self, requests: Sequence[Request]) -> bool:
        return False

    def run(self, requests: Sequence[Request], timeout: float) -> list[Trace]:
        return asyncio.run(self._run(requests, timeout))

    async def _run(self, requests: Sequence[Request], timeout: float) -> list[Trace]:
        messages = {request.id: _message(request) for request in requests}
        async with grpc.aio.insecure_channel(self._address) as channel:
            await asyncio.wait_for(channel.channel_ready(), timeout)
            stub = api_grpc.InferenceServiceStub(channel)

            async def stream(request: Request, recording: Recording) -> None:
                async for response in stub.Generate(messages[request.id], timeout=timeout):
                    if response.WhichOneof("event") == "tokens":
                        recording.take(response.tokens.token_ids)

            try:
                return await play(requests, stream)
            except grpc.aio.AioRpcError as error:
                raise EngineError(f"a stream ended with {error.code().name}: {error.details()}") from error

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


if __name__ == "__main__":
    main(Pagehold)
