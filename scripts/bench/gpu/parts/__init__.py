"""The parts by name. Their modules are imported only in the processes that run them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Final

from gpu.job import Job, Part


def _of(module: str, function: str = "run") -> Callable[[Job], None]:
    def run(job: Job) -> None:
        getattr(import_module(f"gpu.parts.{module}"), function)(job)

    return run


PARTS: Final = (
    Part("kernels", "the kernel tests on the GPU, and tests of what only a GPU has", _of("kernels")),
    Part("sanitizer", "compute-sanitizer's memcheck and racecheck over a subset of them", _of("sanitizer")),
    Part("copy", "rates of a device copy, and of plain reads of pages in random order", _of("copy")),
    Part("decode", "decode attention over a grid of batches and contexts, beside the rates and peers", _of("decode")),
    Part("ladder", "the decode kernel's versions, one beside the other", _of("ladder")),
    Part("append", "append attention of chunks behind prefixes, beside peers", _of("append")),
    Part("gemm", "the fixed-tile GEMM of --deterministic beside torch's", _of("gemm")),
    Part("small", "norms, activation, rotary append, page copies, swap, sampling", _of("small")),
    Part(
        "engine",
        "an 8B-shaped model through the CUDA runner, without and with --deterministic",
        _of("engine"),
    ),
    Part("stack", "the same through real processes and gRPC", _of("stack")),
    Part("transformers", "the same through transformers' generate_batch", _of("transformers_peer")),
    Part("processes", "owners and users of pools that are killed, and what becomes of memory", _of("processes")),
    Part("restarts", "a real stack whose executor is killed in mid-step, again and again", _of("restarts")),
)
