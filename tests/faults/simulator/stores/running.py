"""A sequence, as far as its executor knows."""

from __future__ import annotations

from dataclasses import dataclass

from kvmanager.layout import OutputLog
from tests.faults.simulator.model import OutputTruth
from tests.faults.simulator.stores.requests import PAGE_SIZE


@dataclass(slots=True, eq=False)
class Running:
    """Made again from the shared bytes by every executor."""

    truth: OutputTruth
    log: OutputLog
    computed: int = 0
    row: int = -1
    generation: int = 0
    capacity: int = 0
    asking: bool = False
    short: bool = False  # got no page

    @property
    def key(self) -> str:
        return self.truth.key

    @property
    def index(self) -> int:
        return self.truth.index

    @property
    def limit(self) -> int:
        """The last token is never fed."""
        return max(self.log.capacity - 1, self.log.prompt_length)

    @property
    def need(self) -> int:
        return min(self.log.known + 1, self.limit)

    @property
    def can_run(self) -> bool:
        """There is a place for the next position, or it is run again for its logits."""
        return not self.log.ended and (self.capacity > self.computed or self.computed == self.log.known)

    @property
    def has_headroom(self) -> bool:
        return self.capacity > -(-self.log.known // PAGE_SIZE) * PAGE_SIZE

    @property
    def wants(self) -> bool:
        """There is no place for the next position, no answer on its way, and there may be a page."""
        return not self.asking and not self.short and self.capacity < self.need
