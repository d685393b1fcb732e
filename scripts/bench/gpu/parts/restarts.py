"""A real stack with --deterministic whose executor is killed in mid-step, again and again, while streams go on."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from gpu.job import Job
from gpu.model import LLAMA_3_1B, TINY
from gpu.stack import Stack, prompts, stream_all

_FLAT_MIB: Final = 64.0
_SPARE_SECONDS: Final = 10.0  # for the last restart, beside the streams' own time


@dataclass(frozen=True, slots=True)
class Plan:
    """A kill whenever a stream has got `every` more tokens."""

    kills: int = 10
    every: int = 100
    streams: int = 8
    prompt: int = 512

    @property
    def new(self) -> int:
        return self.every * (self.kills + 1)


TINY_PLAN: Final = Plan(2, 20, 2, 20)


@dataclass
class Killer:
    """Watches tokens come. What takes long is done by threads, for the client must go on reading."""

    stack: Stack
    plan: Plan
    arrivals: list[float] = field(default_factory=list)  # time.perf_counter()
    kills: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # in use on the device before each kill, MiB
    end: float = math.inf  # time.perf_counter() after which none is killed any more
    _pid: int = 0  # of the executor that is next; 0: there is none yet

    def __post_init__(self) -> None:
        self._pid = self.stack.pid("executor")

    def on_tokens(self, number: int, tokens: int) -> None:
        self.arrivals.append(time.perf_counter())
        due = self.plan.every * (len(self.kills) + 1)
        if self._pid and len(self.kills) < self.plan.kills and tokens >= due and time.perf_counter() < self.end:
            self.memory.append(device_memory())
            killed, self._pid = self._pid, 0
            os.kill(killed, signal.SIGKILL)
            self.kills.append(time.perf_counter())
            threading.Thread(target=self._look, args=(killed,), daemon=True).start()

    def _look(self, killed: int) -> None:
        """For the next executor."""
        while (pid := self.stack.pid("executor")) in (0, killed):
            time.sleep(0.02)
        self._pid = pid

    def pauses(self) -> list[float]:
        """From each kill to the end of the silence behind it; messages on their way still came before that."""
        found = []
        for kill, following in pairwise([*self.kills, math.inf]):
            after = [kill, *(arrival for arrival in self.arrivals if kill < arrival < following)]
            ends = [(late - early, late) for early, late in pairwise(after)]
            if ends:
                found.append(max(ends)[1] - kill)
        return found


def run(job: Job) -> None:
    if not job.options.tiny:
        job.note("Llama-3.2-1B's shape, random weights, 8 streams, --deterministic")
    _run(job, "ipc", job.left() / 2)
    _run(job, "vmm", job.left())


def _run(job: Job, pool: str, seconds: float) -> None:
    began = time.perf_counter()
    plan, spec = (TINY_PLAN, TINY) if job.options.tiny else (Plan(), LLAMA_3_1B)
    wanted = prompts(spec, plan.streams, plan.prompt)
    flags: dict[str, str | int | bool] = {"max_num_seqs": plan.streams, "deterministic": True, "pool": pool}
    if not job.options.tiny:
        flags["kv_memory"] = "4GiB"
    with Stack(job, spec, **flags) as stack:
        start = time.perf_counter()
        undisturbed = asyncio.run(stream_all(stack.address, wanted, plan.new))
        spare = 2 * (time.perf_counter() - start) + _SPARE_SECONDS
        killer = Killer(stack, plan, end=began + seconds - spare)
        disturbed = asyncio.run(stream_all(stack.address, wanted, plan.new, killer.on_tokens))
    pauses = killer.pauses()
    times = float(len(pauses))
    pairs = list(zip(undisturbed, disturbed, strict=True))
    same = sum(a == b for one, other in pairs for a, b in zip(one.tokens, other.tokens, strict=True))
    total = sum(len(one.tokens) for one in undisturbed)
    said = "identical" if same == total else f"{total - same} of {total} tokens differ"
    job.emit("processes", ("kill -9 in mid-step", pool), answer=said, times=times)
    if pauses:
        median = statistics.median(pauses)
        said = f"{median:.2f} s median, {max(pauses):.2f} s at most"
        job.emit("processes", ("kill to next token", pool), answer=said, seconds=median, times=times)
    if killer.memory:
        lost = killer.memory[-1] - killer.memory[0]
        said = f"{'flat' if abs(lost) < _FLAT_MIB else f'{lost:.0f} MiB more'} over {len(killer.memory)}"
        job.emit("processes", ("executors killed", pool), answer=said, times=float(len(killer.memory)))


def device_memory() -> float:
    """MiB in use on the first device, whoever uses them; 0 without one."""
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0])
    except (OSError, subprocess.SubprocessError):
        return 0.0
