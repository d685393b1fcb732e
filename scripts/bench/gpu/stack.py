"""A real stack on the GPU, `pagehold up`, and streams through it over gRPC."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from peers_lib.memory import descendants

from gpu.job import Job, PartError
from gpu.model import install
from pagehold.client import Client, make_request
from services.cli.await_ready import await_ready
from services.executor.modelstore.spec import DecoderSpec

STAND_IN: Final = "tests.device.gpu"  # for CUDA
_START_SECONDS: Final = 240.0
_STOP_SECONDS: Final = 60.0


@dataclass
class Stream:
    """One request's tokens, and when they came."""

    tokens: list[int] = field(default_factory=list)
    first: float = 0.0  # time.perf_counter() of the first token's message
    last: float = 0.0


class Stack:
    """Runs from its making to the end of the `with`. flags: of `pagehold up`, by name."""

    def __init__(self, job: Job, spec: DecoderSpec, **flags: str | int | bool) -> None:
        model, cache = install(spec, job.options.work, job.bed.torch_device)
        self._folder = tempfile.TemporaryDirectory(prefix="pagehold-gpu-", dir="/dev/shm")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.log = Path(self._folder.name) / "log"
        given: dict[str, str | int | bool] = {
            "state_dir": f"{self._folder.name}/state",
            "listen": self.address,
            "model": str(model),
            "device": "cuda",
            "prefix_cache": False,
            **({"cuda_driver": STAND_IN, "kv_memory": "32MiB"} if job.options.tiny else {}),
            **flags,
        }
        began = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.cli.main", "up", *_words(given)],
                stdout=log,
                stderr=log,
                env={**os.environ, "XDG_CACHE_HOME": str(cache)},
            )
        if not await_ready(self.address, self.process.pid, min(job.left(), _START_SECONDS)):
            said = self.log.read_text()
            self.close()
            raise PartError(f"the stack did not become ready: {_last_line(said)}")
        self.seconds = time.monotonic() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()  # its children die with it
                self.process.wait()
        self._folder.cleanup()

    def pid(self, component: str) -> int:
        """Of the working process; 0 while there is none. Looks at the processes: `pagehold status` takes longer."""
        for pid in descendants(self.process.pid):
            with suppress(OSError):
                if component.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    return pid
        return 0


async def stream_all(
    address: str, prompts: Sequence[Sequence[int]], new: int, on_tokens: Callable[[int, int], None] | None = None
) -> list[Stream]:
    """All at once. on_tokens: called with a stream's number and its tokens so far, whenever some came."""
    found = [Stream() for _ in prompts]
    async with Client(address, resume_seconds=600.0) as client:

        async def one(number: int) -> None:
            stream = found[number]
            request = make_request(list(prompts[number]), max_tokens=new, temperature=0.0, ignore_eos=True)
            async for response in client.generate(request):
                if response.WhichOneof("event") == "tokens":
                    stream.last = time.perf_counter()
                    stream.first = stream.first or stream.last
                    stream.tokens.extend(response.tokens.token_ids)
                    if on_tokens is not None:
                        on_tokens(number, len(stream.tokens))

        await asyncio.gather(*map(one, range(len(prompts))))
    return found


def prompts(spec: DecoderSpec, count: int, tokens: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, spec.vocab_size, tokens).tolist() for _ in range(count)]


def _words(flags: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and "waiting for" not in line]
    return lines[-1][:400] if lines else "it said nothing"
