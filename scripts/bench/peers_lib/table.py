"""Reports as Markdown, for the terminal and for docs/measurements.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from peers_lib import merge
from peers_lib.contestant import OURS
from peers_lib.merge import Row
from peers_lib.report import Entrant, Report
from peers_lib.scenario import Group
from peers_lib.trace import Figures, median

# The share of the processors that other work may take before figures mean nothing.
QUIET: Final = 0.1

_HEAD: Final = (
    "engine",
    "tokens/s",
    "of the bound",
    "Pagehold is",
    "first token p50 / p99",
    "between tokens p50 / p99",
    "peak memory",
    "ready after",
    "same tokens",
)
_ANOTHER_TIME: Final = " †"
_WIDEST: Final = 60  # cells that a column is made wide for, in characters


def render(reports: Sequence[Report]) -> str:
    """The machine and the runs, one table for each scenario, and what could not be compared.

    Raises ValueError for reports that do not belong together.
    """
    merge.check(reports)
    parts = [_preface(reports)]
    for scenario, load in merge.scenarios(reports).items():
        if load.group is not Group.GROWTH:
            parts.append(f"**{load.title}** (`{scenario}`)\n\n{_table(reports, scenario)}")
    parts += [*_long_contexts(reports), *_growth(reports), _notes(reports)]
    return "\n\n".join(parts) + "\n"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns padded so that it can be read unrendered; a cell with a long reason sticks out."""
    widths = [max(len(row[n]) for row in (head, *rows) if len(row[n]) <= _WIDEST) for n in range(len(head))]
    lines = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in (head, *rows)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _preface(reports: Sequence[Report]) -> str:
    first = reports[0].machine
    about = (
        f"- machine: {first.cpu}, {first.processors} processors, {', '.join(first.instruction_sets)}, "
        f"{first.memory_gib:.0f} GiB"
    )
    return "\n\n".join([f"{about}\n- model: {reports[0].model}; greedy", *map(_run, reports)])


def _run(report: Report) -> str:
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
            f"- measured in this run: {', '.join(rates)}; load average before an engine started: {min(loads):.1f} to "
            f"{max(loads):.1f}{_others(others, machine.processors)}",
            f"- rounds: {report.rounds}, of which figures are medians; page pools of "
            f"{report.kv_memory / 2**30:.1f} GiB; Python {machine.python}, {versions}",
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


def _table(reports: Sequence[Report], scenario: str) -> str:
    found = merge.rows(reports, scenario)
    fastest = merge.fastest(found)
    return grid(_HEAD, [_row(row, found, row.entrant.name in fastest) for row in found])


def _row(row: Row, found: Sequence[Row], is_fastest: bool) -> list[str]:
    name = row.entrant.name
    if not row.outcomes:
        return [name, f"no figure: {row.reason}", *[""] * (len(_HEAD) - 2)]
    return [
        f"{name} (the fastest)" if is_fastest and row.entrant.engine != OURS else name,
        f"{row.speed:.1f}",
        f"{row.speed / row.bound.tokens_per_second:.0%}" if row.bound else "–",
        _times(found, row),
        _pair(row, lambda figures: figures.first_p50, lambda figures: figures.first_p99),
        _pair(row, lambda figures: figures.between_p50, lambda figures: figures.between_p99),
        _mebibytes(max(outcome.peak_bytes for outcome in row.outcomes)),
        _ready(row.report, row.entrant),
        _share([outcome.agreement for outcome in row.outcomes], row, found),
    ]


def _times(found: Sequence[Row], row: Row) -> str:
    ratio = merge.times_as_fast(found, row)
    if ratio is None:
        return ""
    value, together = ratio
    return f"{value:.2f} × as fast{'' if together else _ANOTHER_TIME}"


def _pair(row: Row, *takes: Callable[[Figures], float]) -> str:
    return " / ".join(milliseconds(row.figure(take)) for take in takes)


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


def _share(agreements: Sequence[float | None], row: Row, found: Sequence[Row]) -> str:
    known = [share for share in agreements if share is not None and not math.isnan(share)]
    mine = merge.reference(found, row)
    return f"{median(known):.0%}" if known and mine is not None and not mine.is_same_as(row) else ""


def _long_contexts(reports: Sequence[Report]) -> list[str]:
    """Steps of one request behind a long prompt against those behind a short one."""
    alone = {name: load for name, load in merge.scenarios(reports, Group.BATCH).items() if len(load.prompts) == 1}
    if len(alone) < 2:
        return []
    names = sorted(alone, key=lambda name: alone[name].prompts)
    short, long = names[0], names[-1]
    behind = {row.entrant.name: row for row in merge.rows(reports, short) if row.outcomes}
    lines = []
    for row in merge.rows(reports, long):
        other = behind.get(row.entrant.name)
        if other is not None and row.outcomes:
            steps = (milliseconds(other.step), milliseconds(row.step))
            lines.append([row.entrant.name, *steps, f"{row.step / other.step:.2f} ×"])
    if not lines:
        return []
    head = ("engine", *(f"step behind {alone[name].prompts[0]} tokens" for name in (short, long)), "takes")
    return [f"**What a long context costs a single request** (`{short}`, `{long}`)\n\n{grid(head, lines)}"]


def _growth(reports: Sequence[Report]) -> list[str]:
    """Step times, a column for each number of sequences; the last row is the bound of the latest run."""
    loads = merge.scenarios(reports, Group.GROWTH)
    if not loads:
        return []
    steps: dict[str, dict[str, str]] = {}
    for scenario in loads:
        for row in merge.rows(reports, scenario):
            shown = milliseconds(row.step) if row.outcomes else f"no figure: {row.reason}"
            steps.setdefault(row.entrant.name, {})[scenario] = shown
            if row.bound:
                steps.setdefault("the bound", {})[scenario] = milliseconds(row.bound.step)
    if "the bound" in steps:
        steps["the bound"] = steps.pop("the bound")
    lines = [[name, *(by_scenario.get(scenario, "–") for scenario in loads)] for name, by_scenario in steps.items()]
    first = next(iter(loads.values()))
    head = ("engine", *(f"{len(load.prompts)}" for load in loads.values()))
    title = f"Median step of so many sequences, prompts of {first.prompts[0]} tokens, {first.new_tokens} new ones"
    return [f"**{title}** (`growth`)\n\n{grid(head, lines)}"]


def _notes(reports: Sequence[Report]) -> str:
    lines = [
        "Tokens/s are generated tokens over the whole time, prompts included. *Of the bound* is their share of what "
        "the machine's two measured rates allow a batch in bfloat16, a token a step, which quantized weights and "
        "guessed tokens can pass; the formula is in `scripts/bench/peers_lib/bound.py`. *Pagehold is* divides "
        "Pagehold's first row by this one, round by round, and takes the median; † where the two were measured at "
        "different times. Memory is the proportional set size of all processes, the highest while the scenario ran. "
        "*Same tokens* is the share of greedy tokens before the first difference from Pagehold's; rounding in another "
        "order tips near ties. Prefix caches are off where a row does not name them.",
        "",
    ]
    latest: dict[str, Entrant] = {}
    for report in sorted(reports, key=lambda report: report.started):
        latest |= {entrant.name: entrant for entrant in report.entrants}
    for entrant in latest.values():
        version = f" {entrant.version}" if entrant.version else ""
        first = f"; first start {entrant.first_start:.1f} s" if entrant.first_start is not None else ""
        lines.append(f"- {entrant.name}:{version} {entrant.note}{first}")
    return "\n".join(lines)
