"""The tables of results: their labels, their columns, and how a figure is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Column:
    """figure: its name in results. show: how a number is written."""

    figure: str
    head: str
    show: Callable[[float], str] = "{:.1f}".format


@dataclass(frozen=True, slots=True)
class Table:
    """name: in results."""

    name: str
    title: str
    labels: tuple[str, ...]
    columns: tuple[Column, ...]


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


_percent: Final = "{:.1%}".format
_count: Final = "{:.0f}".format
_digits: Final = "{:.2g}".format
_times: Final = "{:.2f} ×".format
_two: Final = "{:.2f}".format


TABLES: Final = (
    Table(
        "tests",
        "Kernel tests on the GPU",
        ("tests",),
        (
            Column("passed", "passed", _count),
            Column("failed", "failed", _count),
            Column("skipped", "skipped", _count),
            Column("seconds", "s"),
        ),
    ),
    Table(
        "sanitizer",
        "compute-sanitizer over kernel tests",
        ("tool",),
        (Column("errors", "errors", _count), Column("passed", "tests passed", _count), Column("seconds", "s")),
    ),
    Table("rates", "Rates of the memory", ("what",), (Column("gb_s", "GB/s", _count),)),
    Table(
        "decode",
        "Decode attention: 8 KV heads of 128, pages of 16",
        ("cache", "layout", "group", "batch", "context"),
        (
            Column("gb", "GB read", _two),
            Column("seconds", "us", microseconds),
            Column("gb_s", "GB/s", _count),
            Column("of_copy", "of copy", _percent),
            Column("of_read", "of plain read", _percent),
            Column("flashinfer", "FlashInfer us", microseconds),
            Column("fa3", "FA3 us", microseconds),
            Column("plan", "our plan us", microseconds),
            Column("error", "error", _digits),
            Column("aim", "aim"),
        ),
    ),
    Table(
        "ladder",
        "Decode attention, version by version",
        ("version", "batch", "context"),
        (
            Column("seconds", "us", microseconds),
            Column("gb_s", "GB/s", _count),
            Column("of_copy", "of copy", _percent),
            Column("error", "error", _digits),
        ),
    ),
    Table(
        "append",
        "Append attention: chunks behind cached prefixes",
        ("group", "sequences", "chunk", "prefix"),
        (
            Column("seconds", "us", microseconds),
            Column("tflop_s", "TFLOP/s", _count),
            Column("flashinfer", "FlashInfer us", microseconds),
            Column("fa3", "FA3 us", microseconds),
            Column("of_fa3", "of FA3's rate", _percent),
            Column("error", "error", _digits),
            Column("aim", "aim"),
        ),
    ),
    Table(
        "gemm",
        "The fixed-tile GEMM of `--deterministic` beside torch's",
        ("shape", "rows"),
        (
            Column("seconds", "us", microseconds),
            Column("torch", "torch us", microseconds),
            Column("slower", "takes", _times),
            Column("error", "error", _digits),
            Column("same_rows", "rows alone equal"),
        ),
    ),
    Table(
        "small",
        "The other kernels",
        ("kernel", "size"),
        (Column("seconds", "us", microseconds), Column("gb_s", "GB/s", _count), Column("of_copy", "of copy", _percent)),
    ),
    Table(
        "engine",
        "Whole steps: Llama-3-8B's shape, random bfloat16 weights, prompts of 1,024, 256 new tokens",
        ("engine", "sequences"),
        (
            Column("tokens_s", "tokens/s"),
            Column("decode_tokens_s", "decoding only, tokens/s"),
            Column("step", "decode step ms", lambda seconds: f"{seconds * 1e3:.2f}"),
            Column("bound", "bound ms", lambda seconds: f"{seconds * 1e3:.2f}"),
            Column("of_bound", "of the bound", _percent),
            Column("first", "first token s", _two),
        ),
    ),
    Table(
        "processes",
        "Processes that die",
        ("what", "pool"),
        (Column("answer", "found"), Column("seconds", "s", "{:.3f}".format), Column("times", "times", _count)),
    ),
)
