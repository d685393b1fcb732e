"""What the machine is and what it can do at most, measured in the same run as the engines."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

_INSTRUCTION_SETS: Final = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
_BANDWIDTH_BYTES: Final = 512 << 20  # for each thread: beyond a last-level cache of 300 MiB, which some have
_GEMM_SIZES: Final = (1024, 2048)
_REPEATS: Final = 6
_GEMM_REPEATS: Final = 20


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates are the best of a few repeats; None where torch is not installed."""

    cpu: str
    processors: int
    instruction_sets: tuple[str, ...]
    memory_gib: float
    commit: str
    python: str
    versions: dict[str, str]
    load_average: float  # of the last minute, before the first engine started
    read_gb_per_s: float  # numpy max of float64, one thread for each processor
    gemm_float32_gflops: float | None  # torch.mm, n = 1024 or 2048, one thread for each processor
    gemm_bfloat16_gflops: float | None


def examine(repository: Path) -> Machine:
    load = os.getloadavg()[0]
    processors = len(os.sched_getaffinity(0))
    rates = _gemm_rates()
    return Machine(
        cpu=_cpu_model(),
        processors=processors,
        instruction_sets=_instruction_sets(),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        commit=_commit(repository),
        python=platform.python_version(),
        versions=_versions("pagehold", "numpy", "torch", "transformers", "grpcio"),
        load_average=load,
        read_gb_per_s=_read_bandwidth(processors),
        gemm_float32_gflops=rates.get("float32"),
        gemm_bfloat16_gflops=rates.get("bfloat16"),
    )


def _cpu_field(name: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _cpu_model() -> str:
    """Virtual machines often hide the model's name: family and model tell what it is."""
    name = _cpu_field("model name") or platform.machine()
    return f"{name} (family {_cpu_field('cpu family')}, model {_cpu_field('model')})"


def _instruction_sets() -> tuple[str, ...]:
    flags = set(_cpu_field("flags").split())
    return tuple(name for name in _INSTRUCTION_SETS if name in flags)


def _commit(repository: Path) -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True, timeout=30)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return f"{commit or 'unknown'}{' with changes' if changed else ''}"


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _best_seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _read_bandwidth(threads: int) -> float:
    """Gigabytes (10^9) a second. numpy drops the interpreter lock meanwhile, and a maximum hides behind the reads."""
    import numpy as np

    arrays = [np.ones(_BANDWIDTH_BYTES // 8) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best_seconds(lambda: list(pool.map(np.max, arrays)))
    return threads * _BANDWIDTH_BYTES / seconds / 1e9


# In a process of its own: torch would keep its threads and hundreds of megabytes in this one.
_GEMM_PROGRAM: Final = f"""
import os, time, torch
torch.set_grad_enabled(False)
torch.set_num_threads(len(os.sched_getaffinity(0)))
for name in ("float32", "bfloat16"):
    best = 0.0
    for size in {_GEMM_SIZES}:
        left = torch.randn(size, size).to(getattr(torch, name))
        right = torch.randn(size, size).to(getattr(torch, name))
        times = []
        # The first is slow for its own reasons. Without native bfloat16 each may take seconds: two tell enough then.
        while len(times) < 2 or (len(times) < {_GEMM_REPEATS} and sum(times) < 2.0):
            start = time.perf_counter()
            torch.mm(left, right)
            times.append(time.perf_counter() - start)
        best = max(best, 2 * size**3 / min(times) / 1e9)
        if sum(times) > 2.0:
            break
    print(name, best)
"""


def _gemm_rates() -> dict[str, float]:
    """dtype -> GFLOP/s; nothing without torch."""
    try:
        done = subprocess.run([sys.executable, "-c", _GEMM_PROGRAM], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return {}
    lines = (line.split() for line in done.stdout.splitlines())
    return {name: float(rate) for name, rate in lines}
