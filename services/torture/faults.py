"""Which fault comes next. Pure: chance comes from a seeded generator, counts from earlier runs.

Half of the faults go where the fewest trials are, so that every row of the matrix fills up; the other half
fall anywhere, alone or in the middle of the recovery from another one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

ANYWHERE: Final = "any instruction"
FRONTEND: Final = "frontend"
MANAGER: Final = "kvmanager"
EXECUTOR: Final = "executor"
STANDBY: Final = "executor-standby"
BOTH: Final = "executor + kvmanager"
ALL: Final = "all components"
EVERYTHING: Final = "everything"


class Action(Enum):
    """What is done to a process."""

    KILL = "kill"
    STOP = "stop"  # SIGSTOP; its supervisor has to find out
    ERROR = "error"  # an exception at the failpoint
    PAUSE = "pause"  # SIGSTOP, and SIGCONT before anybody finds out


class Trigger(Enum):
    """What makes a process come to its failpoint."""

    LOAD = "load"  # it comes by in its work
    START = "start"  # its successor does, as it starts
    PEER = "peer"  # the death of the process that it talks to


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the crash matrix."""

    component: str
    point: str
    action: Action


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, and how it is brought about."""

    row: Row
    trigger: Trigger = Trigger.LOAD
    count: int = 1  # at which hit of the failpoint


@dataclass(frozen=True, slots=True)
class Plan:
    """What one trial does."""

    fault: Fault
    second: Fault | None = None
    after: float = 0.0  # seconds from the first to the second
    waits: bool = True  # for a standby, if there is to be one


@dataclass(frozen=True, slots=True)
class Only:
    """COMPONENT[:POINT[:ACTION]]: what a run is held to."""

    component: str = ""
    point: str = ""
    action: str = ""

    @classmethod
    def parse(cls, text: str) -> Only:
        return cls(*text.split(":", 2)) if text else cls()

    def allows(self, row: Row) -> bool:
        return (
            self.component in ("", row.component)
            and self.point in ("", row.point)
            and self.action in ("", row.action.value)
        )


def rows(points: Iterable[str]) -> list[Row]:
    """Every row of the matrix: points: names of failpoints, each of which begins with its component."""
    actions = (Action.KILL, Action.STOP, Action.ERROR)
    found = [Row(point.split(".")[0], point, action) for point in points for action in actions]
    single = (FRONTEND, MANAGER, EXECUTOR, STANDBY)
    anywhere = [Row(component, ANYWHERE, action) for component in single for action in (Action.KILL, Action.STOP)]
    anywhere += [Row(component, ANYWHERE, Action.PAUSE) for component in (FRONTEND, MANAGER, EXECUTOR)]
    anywhere += [Row(component, ANYWHERE, Action.KILL) for component in (BOTH, ALL, EVERYTHING)]
    return [row for row in found if row.component in single] + anywhere


class Chooser:
    """Draws one plan after another."""

    def __init__(self, seed: int, points: Iterable[str], counts: Mapping[Row, int], only: Only, standby: bool) -> None:
        """counts: trials of each row so far. Raises ValueError when nothing is left to choose from."""
        self._random = random.Random(f"faults {seed}")
        self._rows = [row for row in rows(points) if only.allows(row) and (standby or row.component != STANDBY)]
        if not self._rows:
            raise ValueError("no fault of that name; see `pagehold failpoint list` and docs/crash-matrix.md")
        self._only = only
        self._counts: Counter[Row] = Counter(counts)
        self._misses: Counter[Row] = Counter()

    def draw(self) -> Plan:
        """The next trial."""
        row = self._rarest() if self._random.random() < 0.5 else self._any()
        waits = self._random.random() < 0.7
        if self._only.component or self._random.random() >= 0.2:
            return Plan(self._bring_about(row), waits=waits)
        second = Row(self._random.choice((FRONTEND, MANAGER, EXECUTOR, EXECUTOR)), ANYWHERE, Action.KILL)
        return Plan(self._bring_about(row), Fault(second), self._random.uniform(0, 0.3), waits)

    def done(self, row: Row) -> None:
        """A trial of this row took place."""
        self._counts[row] += 1

    def missed(self, row: Row) -> None:
        """Its failpoint was not reached in time: others come first for a while."""
        self._misses[row] += 1

    def _rarest(self) -> Row:
        # What is rarely reached must not take all the time, and what costs most stays rare.
        weights = {row: self._counts[row] * _COSTS.get(row.component, 1) + self._misses[row] for row in self._rows}
        least = min(weights.values())
        return self._random.choice([row for row in self._rows if weights[row] == least])

    def _any(self) -> Row:
        kind = self._random.choices(*zip(*_MIX.items(), strict=True))[0]
        fitting = [row for row in self._rows if kind == _kind(row)] or self._rows
        return self._random.choice(fitting)

    def _bring_about(self, row: Row) -> Fault:
        if row.point == ANYWHERE:
            return Fault(row)
        words = set(row.point.replace("_", ".").split("."))
        triggers = [Trigger.LOAD]
        if words & _AT_START:
            triggers = [Trigger.START]
        if words & _WITH_PEER:
            triggers = [Trigger.PEER, *([Trigger.START] if row.component == EXECUTOR else [])]
        trigger = self._random.choice(triggers)
        count = self._random.choice((1, 1, 1, 2, 3, 8)) if trigger is Trigger.LOAD else 1
        return Fault(row, trigger, count)


def peer(component: str) -> str:
    """Whose death makes this component connect anew."""
    return {EXECUTOR: MANAGER, MANAGER: EXECUTOR, FRONTEND: EXECUTOR}[component]


def _kind(row: Row) -> str:
    if row.component in (BOTH, ALL, EVERYTHING, STANDBY):
        return row.component
    return "point" if row.point != ANYWHERE else row.action.value


_MIX: Final = {"point": 40, "kill": 35, "stop": 5, "pause": 4, BOTH: 5, ALL: 4, EVERYTHING: 1, STANDBY: 6}
_COSTS: Final = {ALL: 2, EVERYTHING: 8}
# Words in the names of failpoints that a process only comes to as it starts, or as its peer is new.
_AT_START: Final = {"lock", "map", "adopt", "rebuild"}
_WITH_PEER: Final = {"attach", "introduce"}
