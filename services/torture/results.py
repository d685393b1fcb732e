"""The file in which trials pile up: one object a run, one short array a trial.

Every run appends itself, so that long evidence is gathered in many short runs.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from services.torture.faults import Action, Row


@dataclass(slots=True)
class Trial:
    """One fault, and what streams felt of it."""

    row: Row
    contexts: list[str]  # what streams were doing, and whether something was down already
    standby: bool  # one was waiting
    streams: int  # under way; each is checked to its end
    gaps: list[int]  # ms, of the streams that the fault touched
    wrong: int = 0  # deviations that showed after it; a run ends with them

    def to_json(self) -> list[Any]:
        row = self.row
        contexts = " ".join(self.contexts)
        where = (row.component, row.point, row.action.value)
        return [*where, contexts, int(self.standby), self.streams, self.wrong, self.gaps]

    @classmethod
    def from_json(cls, found: list[Any]) -> Trial:
        component, point, action, contexts, standby, streams, wrong, gaps = found
        return cls(Row(component, point, Action(action)), contexts.split(), bool(standby), streams, gaps, wrong)


@dataclass(slots=True)
class Run:
    """One `pagehold torture`."""

    seed: int
    version: str
    commit: str
    machine: str
    started: str  # UTC
    flags: list[str]  # of `up`
    pool_bytes: int
    load: float  # processes that wanted a processor before the run: other work makes gaps long
    seconds: float = 0.0  # under faults
    requests: int = 0
    streams_checked: int = 0
    tokens_checked: int = 0
    wrong: int = 0
    lost: int = 0
    repeated: int = 0
    errors: int = 0  # statuses that a client would see
    leaks: int = 0
    checks: int = 0  # of the state folder, at rest
    trials: list[Trial] = field(default_factory=list)

    @property
    def has_standby(self) -> bool:
        """It was told to keep one; whether one was ready is each trial's."""
        return "--standby" in self.flags

    @property
    def is_clean(self) -> bool:
        return not (self.wrong or self.lost or self.repeated or self.errors or self.leaks)

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["trials"] = [trial.to_json() for trial in self.trials]
        return found

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Run:
        return cls(**{**found, "trials": [Trial.from_json(trial) for trial in found["trials"]]})


def read(path: Path) -> list[Run]:
    """All runs so far. None yet: no file. Raises ValueError for a file that is something else."""
    if not path.exists():
        return []
    try:
        return [Run.from_json(run) for run in json.loads(path.read_text())["runs"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of pagehold torture: {error}") from error


def append(path: Path, run: Run) -> None:
    """Adds the run, or puts it in the place of an earlier state of itself."""
    runs = [other for other in read(path) if (other.seed, other.started) != (run.seed, run.started)]
    lines = []
    for one in (*runs, run):
        found = one.to_json()
        trials = ",\n  ".join(json.dumps(trial, separators=(",", ":")) for trial in found.pop("trials"))
        lines.append(f'{json.dumps(found)[:-1]}, "trials": [\n  {trials}]}}')
    text = '{"runs": [\n' + ",\n".join(lines) + "\n]}\n"
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text)
    new.replace(path)


def trials_of(runs: list[Run]) -> Counter[Row]:
    """How often each row was tried."""
    return Counter(trial.row for run in runs for trial in run.trials)
