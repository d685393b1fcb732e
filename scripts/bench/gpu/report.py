"""What a part found, as it is kept: plain records, to JSON and back.

A file holds the last run of each part: parts are run one by one, on machines that are there for minutes only.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

FORMAT: Final = 1

Figure = float | str | None  # None: it should have been measured and was not


@dataclass(frozen=True, slots=True)
class Machine:
    """Read off the machine, before a part ran."""

    gpu: str
    driver: str
    memory_gib: float  # of the GPU
    clocks: str  # as found, for people: they are not ours to set
    processors: int
    commit: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Result:
    """One row of one table of `gpu.tables`."""

    table: str
    labels: tuple[str, ...]
    figures: dict[str, Figure]


@dataclass(frozen=True, slots=True)
class PartRun:
    """The last run of a part, whole or not."""

    part: str
    command: str
    started: str  # ISO 8601, UTC
    machine: Machine
    seconds: float
    reason: str  # why it ended early; empty: it came to its end
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a reader must know of the figures


@dataclass(frozen=True, slots=True)
class Report:
    """By part, in the order in which they were first run."""

    runs: dict[str, PartRun] = field(default_factory=dict)

    def with_run(self, run: PartRun) -> Report:
        """A run replaces the former one of its part."""
        return replace(self, runs={**self.runs, run.part: run})

    def results(self, table: str) -> list[Result]:
        return [result for run in self.runs.values() for result in run.results if result.table == table]


def dump(report: Report) -> str:
    """Numbers that are none become null."""
    fields = {"format": FORMAT, "runs": [asdict(run) for run in report.runs.values()]}
    return json.dumps(_without_nan(fields), indent=1, allow_nan=False) + "\n"


def load(text: str) -> Report:
    """Raises ValueError for anything but a report of this format."""
    try:
        fields = json.loads(text)
        if fields["format"] != FORMAT:
            raise ValueError("it is of another format")
        runs = [_run(run) for run in fields["runs"]]
        return Report({run.part: run for run in runs})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a report of scripts/gpu-check: {error}") from error


def encode(result: Result) -> str:
    """One line, from a part's process to the one that keeps results."""
    return json.dumps(_without_nan(asdict(result)), allow_nan=False)


def decode(line: str) -> Result:
    return _result(json.loads(line))


def _run(fields: dict[str, Any]) -> PartRun:
    machine, results = Machine(**fields.pop("machine")), [_result(result) for result in fields.pop("results")]
    return PartRun(**fields, machine=machine, results=results)


def _result(fields: dict[str, Any]) -> Result:
    return Result(fields["table"], tuple(fields["labels"]), fields["figures"])


def _without_nan(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _without_nan(item) for key, item in value.items()}
        case list() | tuple():
            return [_without_nan(item) for item in value]
    return value
