"""How long streams were silent because of a fault. Pure: times come from outside.

A gap is from a client's last token before to its first token after. Which two tokens that are depends on what died:

    executor   the interval in which the client was told that the executor was replaced
    frontend   the interval in which the client's stream broke; other streams had nothing to do with it
    else       the longest interval that overlaps the trial: the executor goes on for a while without its manager

A token that was on its way when the fault came is thereby counted as before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Final

from services.torture.stream import Marks

_NOTHING: Final = math.nan


class Sign(Enum):
    """How the streams that a fault touched are told from the others."""

    NOTICE = "notice"
    BREAK = "break"
    NONE = "none"


def gap(marks: Marks, start: float, end: float, sign: Sign) -> float:
    """Seconds of silence of one stream, in a trial from `start` to `end`. NaN: the trial did not touch it."""
    tokens = marks.tokens
    if not tokens or tokens[0] > start:
        return _NOTHING
    if sign is Sign.NONE:
        return max(_intervals(tokens, start, end), default=_NOTHING)
    signs = marks.notices if sign is Sign.NOTICE else marks.breaks
    touched = [_around(tokens, at) for at in signs if start <= at <= end]
    return max((one for one in touched if not math.isnan(one)), default=_NOTHING)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that is at least as large as this share of them. Raises ValueError without any."""
    if not values:
        raise ValueError("no values")
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def _intervals(tokens: Iterable[float], start: float, end: float) -> Iterable[float]:
    before: float | None = None
    for at in tokens:
        if before is not None and at > start and before < end:
            yield at - before
        before = at


def _around(tokens: Iterable[float], moment: float) -> float:
    """From the last token before `moment` to the first one after it; NaN without one of the two."""
    before = _NOTHING
    for at in tokens:
        if at >= moment:
            return at - before
        before = at
    return _NOTHING
