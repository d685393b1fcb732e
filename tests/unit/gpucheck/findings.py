"""Small made-up results."""

from __future__ import annotations

from gpu.report import Figure, Machine, PartRun, Report, Result

MACHINE = Machine("A GPU", "600.1", 80.0, "SM 300 of 1900 MHz", 16, "0123456789ab", {"torch": "2.11.0"})


def result(table: str, *labels: str, **figures: Figure) -> Result:
    return Result(table, labels, figures)


def run(part: str, *results: Result, reason: str = "", notes: tuple[str, ...] = ()) -> PartRun:
    command = f"scripts/gpu-check {part}"
    started = "2026-01-02T03:04:05+00:00"
    return PartRun(part, command, started, MACHINE, 12.0, reason, list(results), list(notes))


def report(*runs: PartRun) -> Report:
    return Report({one.part: one for one in runs})


def decode(cache: str, layout: str, batch: int, gb_s: float, aim: str, **peers: Figure) -> Result:
    figures: dict[str, Figure] = {"gb": 1.0, "seconds": 1 / gb_s, "gb_s": gb_s, "of_copy": gb_s / 4000, "aim": aim}
    return result("decode", cache, layout, "4", str(batch), "8192", **figures, **peers)
