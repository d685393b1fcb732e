"""Pagehold as it is used: `pagehold up`, all its processes, and a client that streams over gRPC."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from peers_lib.job import Job
from peers_lib.recording import Recording
from peers_lib.requestfile import Request
from peers_lib.trace import Trace
from peers_lib.worker import EngineError, die_with_parent, main

SERVICE: Final = "pagehold.v1.InferenceService"
_POLL_SECONDS: Final = 0.02
_STOP_SECONDS: Final = 45.0  # more than the supervisor gives its children


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _message(request: Request) -> api.GenerateRequest:
    message = api.GenerateRequest(request_id=request.id)
    message.token_ids.ids.extend(request.prompt_token_ids)
    message.sampling.temperature = 0.0
    message.sampling.seed = request.seed
    message.stopping.max_tokens = request.max_tokens
    message.stopping.ignore_eos = request.ignore_eos
    return message


class Pagehold:
    """The worker is only the client: memory and start-up are those of the tree below `pagehold up`."""

    version = metadata.version("pagehold")

    def __init__(self, found_root: Callable[[int], None]) -> None:
        self._found_root = found_root
        self._address = f"127.0.0.1:{_free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        self.started: float | None = None

    @property
    def root(self) -> int:
        return self._process.pid if self._process else 0

    def start(self, job: Job) -> None:
        command = [
            str(Path(sys.executable).with_name("pagehold")),
            "up",
            f"--model={job.model}",
            f"--dtype={job.dtype}",
            f"--listen={self._address}",
            f"--state-dir={job.shared}/state",
            f"--kv-memory={job.kv_memory}",
            "--no-prefix-cache",
            "--log-level=warning",
        ]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.started = time.monotonic()
        self._process = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)
        self._found_root(self._process.pid)
        with grpc.insecure_channel(self._address, options=[("grpc.max_reconnect_backoff_ms", 100)]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            while not self._serving(health):
                if self._process.poll() is not None:
                    raise EngineError(f"`pagehold up` ended with exit code {self._process.returncode}, not ready")
                if time.monotonic() - self.started > job.timeout:
                    raise EngineError(f"`pagehold up` was not ready within {job.timeout:.0f} s")
                time.sleep(_POLL_SECONDS)

    def _serving(self, health: Any) -> bool:
        try:
            answer = health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=1.0)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def run(self, requests: Sequence[Request], timeout: float) -> list[Trace]:
        return asyncio.run(self._run(requests, timeout))

    async def _run(self, requests: Sequence[Request], timeout: float) -> list[Trace]:
        messages = [_message(request) for request in requests]
        async with grpc.aio.insecure_channel(self._address) as channel:
            await asyncio.wait_for(channel.channel_ready(), timeout)
            stub = api_grpc.InferenceServiceStub(channel)

            async def stream(message: api.GenerateRequest) -> Trace:
                recording = Recording(message.request_id)
                async for response in stub.Generate(message, timeout=timeout):
                    if response.WhichOneof("event") == "tokens":
                        recording.take(response.tokens.token_ids)
                return recording.trace()

            try:
                return list(await asyncio.gather(*map(stream, messages)))
            except grpc.aio.AioRpcError as error:
                raise EngineError(f"a stream ended with {error.code().name}: {error.details()}") from error

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        # What is still there is killed by the parent, which adopts orphans.
        self._process.kill()


if __name__ == "__main__":
    main(Pagehold)
