"""What one run of one scenario did, moment by moment, and the figures that follow from it.

Times are seconds of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message that carried tokens to the client."""

    at: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """One request as its client saw it."""

    id: str
    submitted: float
    arrivals: tuple[Arrival, ...]
    token_ids: tuple[int, ...]

    def to_json(self) -> str:
        return json.dumps(
            {
                "id": self.id,
                "submitted": self.submitted,
                "arrivals": [[arrival.at, arrival.tokens] for arrival in self.arrivals],
                "token_ids": self.token_ids,
            }
        )


def read_traces(path: Path) -> list[Trace]:
    """The file that a worker wrote, one trace a line."""
    found = []
    for line in path.read_text().splitlines():
        fields = json.loads(line)
        arrivals = tuple(Arrival(at, tokens) for at, tokens in fields["arrivals"])
        found.append(Trace(fields["id"], fields["submitted"], arrivals, tuple(fields["token_ids"])))
    return found


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run. Times in seconds."""

    requests: int
    tokens: int
    seconds: float  # from the first submission to the last token: prompts are processed within
    tokens_per_second: float
    first_p50: float  # submission to the first token
    first_p99: float
    between_p50: float  # one message with tokens to the next of the same request
    between_p99: float
    token_p50: float = math.nan  # that time over the tokens of the later message, token by token; not in old reports

    @property
    def step(self) -> float:
        """Seconds that a token took after the first, however many came in a message."""
        if not math.isnan(self.token_p50):
            return self.token_p50
        if self.requests == 1 and self.tokens > 1:
            return (self.seconds - self.first_p50) / (self.tokens - 1)
        return self.between_p50


class IncompleteError(Exception):
    """A request did not get all of its tokens."""


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest ranks; nan of nothing."""
    if not 0 <= percent <= 100:
        raise ValueError("a percentile lies between 0 and 100")
    if not values:
        return math.nan
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def median(values: Sequence[float]) -> float:
    return percentile(values, 50)


def figures(traces: Sequence[Trace], wanted: dict[str, int]) -> Figures:
    """`wanted` maps each request's id to its number of tokens; an engine that gives fewer has not done the work.

    Raises IncompleteError.
    """
    for trace in traces:
        got = sum(arrival.tokens for arrival in trace.arrivals)
        if got != wanted[trace.id] or len(trace.token_ids) != got:
            raise IncompleteError(f"request {trace.id} got {got} tokens of {wanted[trace.id]}")
    if not traces:
        raise IncompleteError("no request was answered")
    tokens = sum(len(trace.token_ids) for trace in traces)
    seconds = max(trace.arrivals[-1].at for trace in traces) - min(trace.submitted for trace in traces)
    first = [trace.arrivals[0].at - trace.submitted for trace in traces]
    pairs = [pair for trace in traces for pair in pairwise(trace.arrivals)]
    between = [later.at - earlier.at for earlier, later in pairs]
    shares = [(later.at - earlier.at) / later.tokens for earlier, later in pairs for _ in range(later.tokens)]
    return Figures(
        requests=len(traces),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        first_p50=percentile(first, 50),
        first_p99=percentile(first, 99),
        between_p50=percentile(between, 50),
        between_p99=percentile(between, 99),
        token_p50=percentile(shares, 50),
    )


def agreement(traces: Sequence[Trace], other: Sequence[Trace]) -> float:
    """The share of `traces`' tokens that come before the first difference from `other`, over requests in both.

    Greedy output of the same weights: arithmetic in another order may tip a near tie, after which the rest differs.
    nan when no request is in both.
    """
    known = {trace.id: trace.token_ids for trace in other}
    same = 0
    total = 0
    for trace in traces:
        if trace.id not in known:
            continue
        total += len(trace.token_ids)
        for mine, theirs in zip(trace.token_ids, known[trace.id], strict=False):
            if mine != theirs:
                break
            same += 1
    return same / total if total else math.nan
