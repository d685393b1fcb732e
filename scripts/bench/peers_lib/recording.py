"""Builds a trace while tokens arrive, inside the client of an engine."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from peers_lib.trace import Arrival, Trace


@dataclass(slots=True)
class Recording:
    """One request; `submitted` is the moment of its making."""

    id: str
    submitted: float = field(default_factory=time.monotonic)
    arrivals: list[Arrival] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def take(self, token_ids: Iterable[int]) -> None:
        """Called at once when a message comes; one without tokens is nothing."""
        ids = list(token_ids)
        if ids:
            self.arrivals.append(Arrival(time.monotonic(), len(ids)))
            self.token_ids.extend(ids)

    def trace(self) -> Trace:
        return Trace(self.id, self.submitted, tuple(self.arrivals), tuple(self.token_ids))
