"""The questions that a GPU must answer, the part that finds each out, and what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from gpu.answers import against_peers, at, deterministic, layouts, met, said, sanitizer, spread, tests
from gpu.report import Result


@dataclass(frozen=True, slots=True)
class Question:
    """part: which finds it out. answer: one line from the table's results, of which there is at least one."""

    part: str
    table: str
    what: str
    aim: str
    answer: Callable[[Sequence[Result]], str]


_percent: Final = "{:.1%}".format
_count: Final = "{:.0f}".format
_rate: Final = "{:.0f} GB/s".format


def _speed(what: str, part: str, *labels: str) -> Question:
    return Question(
        part, "engine", f"output tokens/s at 32 sequences, {what}", "", at("tokens_s", _count, *labels, "32")
    )


def _deaths(part: str, label: str, what: str, aim: str = "") -> Question:
    return Question(part, "processes", what, aim, said(label))


QUESTIONS: Final = (
    Question("kernels", "tests", "kernel tests on the GPU", "all pass", tests),
    Question("sanitizer", "sanitizer", "compute-sanitizer memcheck and racecheck", "no error", sanitizer),
    Question("copy", "rates", "device copy, bytes read and written", "", at("gb_s", _rate, "device copy")),
    Question("copy", "rates", "these and reads of pages in random order", "", spread("gb_s", _rate)),
    Question("decode", "decode", "decode attention, bfloat16, against the memory", "all cases", met("bfloat16")),
    Question("decode", "decode", "decode attention, fp8, against the memory", "all cases", met("fp8")),
    Question("decode", "decode", "decode attention against the faster peer", "not slower", against_peers),
    Question("decode", "decode", "page-major against layer-major pools", "the better one", layouts),
    Question("ladder", "ladder", "decode kernels v1 to v3, of the copy rate", "", spread("of_copy", _percent)),
    Question("append", "append", "append attention, chunks behind 8k, of FlashAttention-3", "60 %", met()),
    Question("gemm", "gemm", "fixed-tile GEMM against torch's", "", spread("slower", "{:.2f} times as long".format)),
    _speed("runner alone", "engine", "runner"),
    _speed("full stack", "stack", "full stack"),
    _speed("transformers `generate_batch`", "transformers", "transformers"),
    Question("engine", "engine", "decode step at 32, of the bound", "80 %", at("of_bound", _percent, "runner", "32")),
    Question("engine", "engine", "decode step at 32 with `--deterministic`", "", deterministic),
    _deaths("restarts", "kill -9 in mid-step", "tokens after `kill -9` of the executor, deterministic", "identical"),
    _deaths("restarts", "kill to next token", "`kill -9` of the executor to the next token"),
    _deaths("restarts", "executors killed", "device memory over executors killed, 10 if time allows", "flat"),
    _deaths("processes", "200 readers killed", "device memory over 200 killed readers of a pool", "flat"),
    _deaths("processes", "owner killed", "a pool whose owner is killed while others use it"),
    _deaths("processes", "last write", "a killed writer's last write, after its pidfd is readable", "none later"),
    _deaths("processes", "memory returned", "kill to memory returned"),
    _deaths("processes", "same PID value", "owner and user with one PID value in two namespaces"),
    _deaths("processes", "parked descriptor", "a pool that only a descriptor holds while its owner dies"),
    _deaths("processes", "illegal access", "an illegal access by one of its users", "the pool is unharmed"),
)
