"""Several reports as one: runs of the same model on the same machine, made at different times.

A row is an entrant in a report. Where two reports have the same entrant in the same scenario, the later one with
figures counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peers_lib.bound import Bound
from peers_lib.contestant import ENGINES, OURS
from peers_lib.ratio import ours, pairs
from peers_lib.report import Entrant, Load, Outcome, Report
from peers_lib.scenario import Group
from peers_lib.trace import Figures, median

_ORDER = [engine.name for engine in ENGINES]


@dataclass(frozen=True, slots=True)
class Row:
    """What one report says of one entrant in one scenario."""

    report: Report
    entrant: Entrant
    scenario: str

    def is_same_as(self, other: Row) -> bool:
        return self.report is other.report and self.entrant.name == other.entrant.name

    @property
    def outcomes(self) -> list[Outcome]:
        return self.report.of(self.scenario, self.entrant.name)

    @property
    def reason(self) -> str:
        """Why there are no figures."""
        if self.entrant.reason:
            return self.entrant.reason
        name = (self.scenario, self.entrant.name)
        reasons = (one.reason for one in self.report.outcomes if (one.scenario, one.entrant) == name and one.reason)
        return next(reasons, "not run")

    def figure(self, take: Callable[[Figures], float]) -> float:
        """The median over the rounds; nan without figures."""
        return median([take(outcome.figures) for outcome in self.outcomes if outcome.figures])

    @property
    def speed(self) -> float:
        return self.figure(lambda figures: figures.tokens_per_second)

    @property
    def step(self) -> float:
        return self.figure(lambda figures: figures.step)

    @property
    def bound(self) -> Bound | None:
        return self.report.bound(self.scenario)


def check(reports: Sequence[Report]) -> None:
    """Raises ValueError for reports that cannot be on one page."""
    if not reports:
        raise ValueError("no report")
    for what, found in {
        "machines": {(one.machine.cpu, one.machine.processors) for one in reports},
        "models": {one.model for one in reports},
    }.items():
        if len(found) > 1:
            raise ValueError(f"the reports are of different {what}: {', '.join(map(str, sorted(found)))}")
    loads: dict[str, Load] = {}
    for report in reports:
        for name, load in report.scenarios.items():
            if loads.setdefault(name, load) != load:
                raise ValueError(f"the reports have different scenarios of the name {name}")


def scenarios(reports: Sequence[Report], *groups: Group) -> dict[str, Load]:
    """By name, in the order in which they were first run; of these groups, or all."""
    found: dict[str, Load] = {}
    for report in reports:
        for name, load in report.scenarios.items():
            if not groups or load.group in groups:
                found.setdefault(name, load)
    return found


def rows(reports: Sequence[Report], scenario: str) -> list[Row]:
    """Engine by engine, in the order of `contestant.ENGINES`."""
    found: dict[str, Row] = {}
    for report in sorted(reports, key=lambda report: report.started):
        if scenario in report.scenarios:
            for entrant in report.entrants:
                row = Row(report, entrant, scenario)
                if row.outcomes or entrant.name not in found:
                    found[entrant.name] = row
    return sorted(found.values(), key=lambda row: _place(row.entrant.engine))


def _place(engine: str) -> int:
    return _ORDER.index(engine) if engine in _ORDER else len(_ORDER)


def reference(found: Sequence[Row], of: Row) -> Row | None:
    """Pagehold's row to compare with: the first that is named in the same run, or else any that is there."""
    first = ours(of.report)
    if first is not None and (mine := Row(of.report, first, of.scenario)).outcomes:
        return mine
    return next((row for row in found if row.entrant.engine == OURS and row.outcomes), None)


def times_as_fast(found: Sequence[Row], of: Row) -> tuple[float, bool] | None:
    """Pagehold's tokens a second over this row's, and whether it is a ratio within one run, round by round.

    None of the reference itself, and of what cannot be compared.
    """
    mine = reference(found, of)
    if mine is None or mine.is_same_as(of) or not of.outcomes:
        return None
    if mine.report is not of.report:
        return mine.speed / of.speed, False
    by_round = pairs(mine.outcomes, of.outcomes, "tokens_per_second")
    return (median(by_round), True) if by_round else None


def fastest(found: Sequence[Row]) -> set[str]:
    """Names of the rows that are the fastest of their engine, where it has several with figures."""
    by_engine: dict[str, list[Row]] = {}
    for row in found:
        if row.outcomes:
            by_engine.setdefault(row.entrant.engine, []).append(row)
    return {max(group, key=lambda row: row.speed).entrant.name for group in by_engine.values() if len(group) > 1}
