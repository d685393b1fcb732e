"""Pagehold over its peers: pair by pair within a round, then the median over the rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from peers_lib.contestant import OURS
from peers_lib.report import Entrant, Outcome, Report
from peers_lib.trace import Figures, median

# What is divided. Of the first more is better, of the others less.
_QUANTITIES: Final[dict[str, Callable[[Figures, Outcome], float]]] = {
    "tokens_per_second": lambda figures, outcome: figures.tokens_per_second,
    "first_p50": lambda figures, outcome: figures.first_p50,
    "between_p50": lambda figures, outcome: figures.between_p50,
    "peak_bytes": lambda figures, outcome: float(outcome.peak_bytes),
}


@dataclass(frozen=True, slots=True)
class Ratio:
    """`by_round` is ours divided by the peer's; rounds in which either failed are not in it."""

    scenario: str
    peer: str
    quantity: str
    by_round: tuple[float, ...]
    median: float
    fastest: bool  # of the peer's engine in this scenario: the others are no yardstick


def ours(report: Report) -> Entrant | None:
    return next((entrant for entrant in report.entrants if entrant.engine == OURS), None)


def pairs(mine: list[Outcome], theirs: list[Outcome], quantity: str) -> tuple[float, ...]:
    """One ratio for each round in which both have figures."""
    by_round = {outcome.round: outcome for outcome in theirs}
    found = []
    for outcome in mine:
        other = by_round.get(outcome.round)
        if other is None or outcome.figures is None or other.figures is None:
            continue
        take = _QUANTITIES[quantity]
        below = take(other.figures, other)
        found.append(take(outcome.figures, outcome) / below if below else math.nan)
    return tuple(found)


def fastest(report: Report, scenario: str, engine: str) -> str | None:
    """The engine's entrant with the highest median of tokens a second; None: it has no figures."""
    speeds = {
        entrant.name: median([outcome.figures.tokens_per_second for outcome in outcomes if outcome.figures])
        for entrant in report.entrants
        if entrant.engine == engine and (outcomes := report.of(scenario, entrant.name))
    }
    return max(speeds, key=speeds.__getitem__) if speeds else None


def ratios(report: Report) -> list[Ratio]:
    """Of every scenario, peer and quantity that can be compared."""
    us = ours(report)
    if us is None:
        return []
    found = []
    for scenario in report.scenarios:
        mine = report.of(scenario, us.name)
        for entrant in report.entrants:
            if entrant.engine == OURS:
                continue
            theirs = report.of(scenario, entrant.name)
            is_fastest = fastest(report, scenario, entrant.engine) == entrant.name
            for quantity in _QUANTITIES:
                by_round = pairs(mine, theirs, quantity)
                if by_round:
                    found.append(Ratio(scenario, entrant.name, quantity, by_round, median(by_round), is_fastest))
    return found


def as_records(found: list[Ratio]) -> list[dict[str, Any]]:
    return [asdict(ratio) for ratio in found]
