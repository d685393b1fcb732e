"""A comparison's results as they are kept: plain records, to JSON and back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from peers_lib.bound import Bound, Rates, Shape, bound
from peers_lib.machine import Machine
from peers_lib.scenario import Group
from peers_lib.trace import Figures

FORMAT: Final = 2


@dataclass(frozen=True, slots=True)
class Entrant:
    """One row of every table."""

    name: str
    engine: str
    dtype: str
    flags: tuple[str, ...]
    note: str
    version: str
    reason: str  # why it could not be compared; empty: it was
    first_start: float | None  # seconds, before the rounds: compilations and caches are filled then


@dataclass(frozen=True, slots=True)
class Load:
    """One scenario as it was run."""

    title: str
    group: Group
    prompts: list[int]  # tokens of each
    new_tokens: int  # after each


@dataclass(frozen=True, slots=True)
class Start:
    """One start in one round."""

    round: int
    entrant: str
    seconds: float
    peak_bytes: int  # until it was ready
    load_average: float  # of the minute before: what else the machine did


@dataclass(frozen=True, slots=True)
class Outcome:
    """One scenario of one entrant in one round: figures, or a reason why there are none."""

    round: int
    entrant: str
    scenario: str
    figures: Figures | None
    peak_bytes: int
    others: float | None  # processors that other work kept busy meanwhile
    agreement: float | None  # with Pagehold's tokens of the same round; see trace.agreement
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything from which tables and ratios are made."""

    command: str
    started: str  # ISO 8601, UTC
    machine: Machine
    load_average_after: float
    model: str
    shape: Shape
    kv_memory: int  # bytes
    rounds: int
    scenarios: dict[str, Load]
    entrants: list[Entrant]
    starts: list[Start]
    outcomes: list[Outcome]

    @property
    def rates(self) -> Rates | None:
        """What a bound is made of; None where torch, which tells one of them, is not installed."""
        gemm = [rate for rate in (self.machine.gemm_float32_gflops, self.machine.gemm_bfloat16_gflops) if rate]
        return Rates(max(gemm) * 1e9, self.machine.read_gb_per_s * 1e9) if gemm else None

    def bound(self, scenario: str) -> Bound | None:
        """Of a batch; None of anything else."""
        load, rates = self.scenarios[scenario], self.rates
        if rates is None or load.group not in (Group.BATCH, Group.GROWTH):
            return None
        return bound(self.shape, load.prompts, load.new_tokens, rates)

    def of(self, scenario: str, entrant: str) -> list[Outcome]:
        """With figures, by round."""
        found = (outcome for outcome in self.outcomes if (outcome.scenario, outcome.entrant) == (scenario, entrant))
        return sorted((outcome for outcome in found if outcome.figures), key=lambda outcome: outcome.round)


def dump(report: Report, ratios: Iterable[dict[str, Any]] = ()) -> str:
    """`ratios` are for readers of the file; `load` derives them again. Numbers that are none become null."""
    fields = {"format": FORMAT, **asdict(report), "ratios": list(ratios)}
    return json.dumps(_without_nan(fields), indent=1, allow_nan=False) + "\n"


def load(text: str) -> Report:
    """Raises ValueError for anything but a report of this format."""
    try:
        fields = json.loads(text)
        if fields.pop("format") != FORMAT:
            raise ValueError("it is of another format")
        fields.pop("ratios", None)
        machine = fields.pop("machine")
        machine["instruction_sets"] = tuple(machine["instruction_sets"])
        return Report(
            machine=Machine(**machine),
            shape=Shape(**fields.pop("shape")),
            scenarios={
                name: Load(**{**one, "group": Group(one["group"])}) for name, one in fields.pop("scenarios").items()
            },
            entrants=[Entrant(**{**one, "flags": tuple(one["flags"])}) for one in fields.pop("entrants")],
            starts=[Start(**start) for start in fields.pop("starts")],
            outcomes=[
                Outcome(**{**outcome, "figures": _figures(outcome["figures"])}) for outcome in fields.pop("outcomes")
            ],
            **fields,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a report of scripts/bench/peers: {error}") from error


def _figures(fields: dict[str, Any] | None) -> Figures | None:
    if fields is None:
        return None
    numbers: dict[str, Any] = {name: math.nan if value is None else value for name, value in fields.items()}
    return Figures(**numbers)


def _without_nan(value: Any) -> Any:
    match value:
        case float() if math.isnan(value):
            return None
        case dict():
            return {key: _without_nan(item) for key, item in value.items()}
        case list() | tuple():
            return [_without_nan(item) for item in value]
    return value
