"""A report as Markdown, for the terminal and for docs/measurements.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from peers_lib.contestant import OURS
from peers_lib.ratio import Ratio, fastest, ratios
from peers_lib.report import Entrant, Outcome, Report
from peers_lib.trace import Figures, median

# The share of the processors that other work may take before figures mean nothing.
QUIET: Final = 0.1

_HEAD: Final = (
    "engine",
    "tokens/s",
    "Pagehold is",
    "first token p50 / p99",
    "between tokens p50 / p99",
    "peak memory",
    "ready after",
    "same tokens",
)


def render(report: Report) -> str:
    """The machine, one table for each scenario, and what could not be compared."""
    found = ratios(report)
    parts = [_preface(report)]
    for scenario, title in report.scenarios.items():
        rows = [_row(report, scenario, entrant, found) for entrant in report.entrants]
        parts.append(f"**{title}**\n\n{grid(_HEAD, rows)}")
    parts.append(_notes(report))
    return "\n\n".join(parts) + "\n"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns padded so that it can be read unrendered."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in (head, *rows)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _preface(report: Report) -> str:
    machine = report.machine
    rates = [f"reads {machine.read_gb_per_s:.1f} GB/s"]
    for name, rate in (("float32", machine.gemm_float32_gflops), ("bfloat16", machine.gemm_bfloat16_gflops)):
        if rate is not None:
            rates.append(f"torch.mm {name} {rate:.0f} GFLOP/s")
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    loads = [machine.load_average, report.load_average_after, *(start.load_average for start in report.starts)]
    others = [outcome.others for outcome in report.outcomes if outcome.others is not None]
    return "\n".join(
        (
            f"Made by `{report.command}`, {report.started}, at commit {machine.commit}.",
            "",
            f"- machine: {machine.cpu}, {machine.processors} processors, {', '.join(machine.instruction_sets)}, "
            f"{machine.memory_gib:.0f} GiB; measured in this run: {', '.join(rates)}",
            f"- load average before an engine started: {min(loads):.1f} to {max(loads):.1f}"
            f"{_others(others, machine.processors)}",
            f"- model: {report.model}; rounds: {report.rounds}, of which figures are medians; "
            f"page pools of {report.kv_memory / 2**30:.1f} GiB; prefix caches off; greedy",
            f"- Python {machine.python}, {versions}",
        )
    )


def _others(others: Sequence[float], processors: int) -> str:
    """What else ran; spinning threads of one engine suffer far more from it than another's that sleep."""
    if not others:
        return ""
    text = f"; while scenarios ran, other work kept {median(others):.2f} processors busy, {max(others):.2f} at most"
    if max(others) > QUIET * processors:
        text += ": **not a quiet machine, no figure here is to be relied on**"
    return text


def _row(report: Report, scenario: str, entrant: Entrant, found: Sequence[Ratio]) -> list[str]:
    outcomes = report.of(scenario, entrant.name)
    rest = len(_HEAD) - 2
    if not outcomes:
        return [entrant.name, f"no figure: {_reason(report, scenario, entrant)}", *[""] * rest]
    name = entrant.name
    if entrant.engine != OURS and fastest(report, scenario, entrant.engine) == name and _siblings(report, entrant) > 1:
        name += " (the faster)"
    return [
        name,
        f"{_median(outcomes, lambda figures: figures.tokens_per_second):.1f}",
        _times(found, scenario, entrant.name),
        _pair(outcomes, lambda figures: figures.first_p50, lambda figures: figures.first_p99),
        _pair(outcomes, lambda figures: figures.between_p50, lambda figures: figures.between_p99),
        _mebibytes(max(outcome.peak_bytes for outcome in outcomes)),
        _ready(report, entrant),
        _share([outcome.agreement for outcome in outcomes], entrant),
    ]


def _siblings(report: Report, entrant: Entrant) -> int:
    return sum(other.engine == entrant.engine for other in report.entrants)


def _reason(report: Report, scenario: str, entrant: Entrant) -> str:
    if entrant.reason:
        return entrant.reason
    reasons = (o.reason for o in report.outcomes if (o.scenario, o.entrant) == (scenario, entrant.name) and o.reason)
    return next(reasons, "not run")


def _median(outcomes: Sequence[Outcome], take: Callable[[Figures], float]) -> float:
    return median([take(outcome.figures) for outcome in outcomes if outcome.figures])


def _times(found: Sequence[Ratio], scenario: str, peer: str) -> str:
    for ratio in found:
        if (ratio.scenario, ratio.peer, ratio.quantity) == (scenario, peer, "tokens_per_second"):
            return f"{ratio.median:.2f} × as fast"
    return ""


def _pair(outcomes: Sequence[Outcome], *takes: Callable[[Figures], float]) -> str:
    return " / ".join(milliseconds(_median(outcomes, take)) for take in takes)


def milliseconds(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    shown = seconds * 1000
    return f"{shown:.1f} ms" if shown < 100 else f"{shown:.0f} ms" if shown < 10_000 else f"{seconds:.1f} s"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size else "–"


def _ready(report: Report, entrant: Entrant) -> str:
    seconds = [start.seconds for start in report.starts if start.entrant == entrant.name]
    return f"{median(seconds):.1f} s" if seconds else "–"


def _share(agreements: Sequence[float | None], entrant: Entrant) -> str:
    known = [share for share in agreements if share is not None and not math.isnan(share)]
    return f"{median(known):.0%}" if known and entrant.engine != OURS else ""


def _notes(report: Report) -> str:
    lines = [
        "Tokens/s are generated tokens over the whole time, prompts included. *Pagehold is* divides round by round and "
        "takes the median. Memory is the proportional set size of all processes, the highest while the scenario ran. "
        "*Same tokens* is the share of greedy tokens before the first difference from Pagehold's; rounding in another "
        "order tips near ties.",
        "",
    ]
    for entrant in report.entrants:
        version = f" {entrant.version}" if entrant.version else ""
        first = f"; first start {entrant.first_start:.1f} s" if entrant.first_start is not None else ""
        lines.append(f"- {entrant.name}:{version} {entrant.note}{first}")
    return "\n".join(lines)
