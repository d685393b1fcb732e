"""What was found, as Markdown: for the terminal and for docs/measurements.md.

A question without results says "not measured"; nothing is filled in from anywhere else.
"""

from __future__ import annotations

from collections.abc import Collection

from peers_lib.table import grid

from gpu.answers import NOT_MEASURED
from gpu.catalogue import TABLES, Column
from gpu.questions import QUESTIONS
from gpu.report import Figure, PartRun, Report


def render(report: Report) -> str:
    """For the terminal: what each part found, with its aims."""
    blocks = [_run(run) for run in report.runs.values()]
    blocks.append(overview(report, report.runs))
    blocks += details(report)
    return "\n\n".join(block for block in blocks if block) + "\n"


def overview(report: Report, parts: Collection[str] | None = None) -> str:
    """One row a question; `parts`: of these only."""
    rows = [
        (
            question.what,
            question.aim,
            question.answer(found) if (found := report.results(question.table)) else NOT_MEASURED,
            f"`scripts/gpu-check {question.part}`",
        )
        for question in QUESTIONS
        if parts is None or question.part in parts
    ]
    return grid(("what", "aim", "found", "command"), rows) if rows else ""


def details(report: Report) -> list[str]:
    """A table of each kind of result that there is."""
    blocks = []
    for table in TABLES:
        if found := report.results(table.name):
            columns = [column for column in table.columns if any(column.figure in r.figures for r in found)]
            rows = [(*result.labels, *(_cell(result.figures.get(c.figure), c) for c in columns)) for result in found]
            blocks.append(f"**{table.title}**\n\n{grid((*table.labels, *(c.head for c in columns)), rows)}")
    return blocks


def _run(run: PartRun) -> str:
    machine = run.machine
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    end = f" It did not come to its end: {run.reason}." if run.reason else ""
    notes = "".join(f"\n  - {note}" for note in run.notes)
    return (
        f"- {run.part}: `{run.command}`, {run.started}, commit {machine.commit}, {run.seconds:.0f} s; {machine.gpu}, "
        f"{machine.memory_gib:.0f} GiB, driver {machine.driver}, {machine.clocks}; {versions}.{end}{notes}"
    )


def runs(report: Report) -> str:
    """Where the figures come from: a line a part."""
    return "\n".join(_run(run) for run in report.runs.values())


def _cell(value: Figure, column: Column) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else column.show(value)
