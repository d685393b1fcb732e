"""Where the outputs of one request find the pages of their prompt: computed once, by one of them.

    a sibling runs and has computed the prompt    fork: share its pages, copy its last one
    a sibling in front can still compute it       wait for that one, however long it takes
    no such sibling                               ensure: this one computes it, or finds it cached

All of it follows from the sequences, so it holds after a death as before. An output that has tokens of
its own asks `ensure` where prefixes are cached: it may find more than the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.executor.sequence import Phase, Request, Sequence


@dataclass(frozen=True, slots=True)
class Origin:
    """What a request's outputs have of their prompt."""

    source: Sequence | None  # has a row, and the whole prompt in it
    leader: Sequence | None  # the first that can still compute it


@dataclass(frozen=True, slots=True)
class Way:
    """How one waiting sequence comes to its row."""

    source: Sequence | None = None  # fork it; None: `ensure`
    waits: bool = False  # neither, yet


ENSURE = Way()
WAIT = Way(waits=True)


def origin_of(request: Request, parked: Callable[[Sequence], bool]) -> Origin:
    """The lowest index wins, so all outputs agree on whom they wait for."""
    leader: Sequence | None = None
    for sequence in request.sequences:
        if sequence.phase is Phase.RUNNING and sequence.settled >= sequence.prompt_length:
            return Origin(sequence, leader)
        if leader is None and sequence.phase is not Phase.ENDED and not parked(sequence):
            leader = sequence
    return Origin(None, leader)


def way_of(sequence: Sequence, origin: Origin) -> Way:
    """For a sequence that waits and is not parked."""
    if origin.source is not None:
        return Way(source=origin.source)
    # In front: an output never waits for one that comes after it, or both would wait.
    return ENSURE if origin.leader is None or origin.leader.index >= sequence.index else WAIT
