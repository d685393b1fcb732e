"""Which waiting sequences ask for a row in a turn, and how: in order, nobody overtaking who found the pool full.

    waiting  [ in front of the blocked one | blocked | behind it ]
               may ask: never refused yet    asks when  wait for it
                                             pages come
                                             back

Held back are outputs whose sibling computes their prompt (`forks`), and, for a bounded time, sequences
whose next page a neighbour is about to fill. A sequence that has lost its row asks alone: those behind it
do not ask before it is answered, so of one priority none overtakes it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Final

from pagehold.kv.v1 import kv_manager_pb2 as kv
from services.executor import calls
from services.executor.forks import ENSURE, Origin, Way, origin_of, way_of
from services.executor.preemption import choose_victim
from services.executor.scheduler import Scheduler
from services.executor.sequence import Phase, Sequence

_HOLD_SECONDS: Final = 5.0  # how long a request waits for a neighbour to fill a page that it would share
_RETRY_SECONDS: Final = 0.05
_MOST_ASKING: Final = 16  # admissions on their way at once
_MOST_HELD: Final = 256  # held sequences that are looked at in one turn


class Admission:
    """The step thread's dealings with the waiting sequences."""

    def __init__(
        self, scheduler: Scheduler, prefix_cache: bool, fork: bool, preempt: Callable[[Sequence], kv.Call]
    ) -> None:
        """preempt: takes a running sequence's row away; its call."""
        self._scheduler = scheduler
        self._prefix_cache = prefix_cache
        self._fork = fork
        self._preempt = preempt
        self._now = 0.0
        self._ask_after = 0.0  # infinite: not before pages come back
        self._blocked: Sequence | None = None  # the first in order that found the pool full
        self.squeezed = False  # unwritten headroom was given back for the blocked one already

    def begin(self, now: float) -> None:
        """A new turn. now: monotonic seconds."""
        self._now = now
        if self._blocked is not None and self._blocked.phase is not Phase.WAITING:
            self._block(None)
            self.freed()  # for those behind it the pool may do

    def freed(self) -> None:
        """Pages may have come back: those who wait may try again."""
        self._ask_after = 0.0

    def refused(self, sequence: Sequence) -> None:
        """It found the pool full."""
        if self._blocked is None or sequence.priority_key < self._blocked.priority_key:
            self._block(sequence)
        # With nothing running, what holds the pages is not known here: asking at once would be asking for ever.
        self._ask_after = inf if self._scheduler.running else self._now + _RETRY_SECONDS

    def _block(self, sequence: Sequence | None) -> None:
        self._blocked, self.squeezed = sequence, False

    def pressing(self) -> Sequence | None:
        """The blocked sequence, if somebody that runs is to make room for it."""
        sequence, running = self._blocked, self._scheduler.running
        if sequence is None or sequence.asking or not running or self._scheduler.parked(sequence):
            return None
        yields = running[-1].priority < sequence.priority or bool(self._scheduler.resting())
        if not yields or self._way(sequence, {}).waits:
            return None
        # Those in front of it may have taken the last lane since: then only a row that is taken away helps.
        self.squeezed = self.squeezed or not self._scheduler.admissible()
        return sequence

    def ask(self, sequence: Sequence) -> kv.Call:
        """For its row, now."""
        return self._ask(sequence, self._way(sequence, {}))

    def calls(self) -> list[kv.Call]:
        """The turn's calls, each `ensure` or `fork` after the `close` that makes way for it."""
        scheduler = self._scheduler
        room = scheduler.admissible() if scheduler.waiting else 0
        # They are in order: if nobody makes a lane free for the first, nobody does for those behind it.
        if not scheduler.waiting or (room == 0 and self._victim(scheduler.waiting[0]) is None):
            return []
        found: list[kv.Call] = []
        filling = scheduler.filling() if self._prefix_cache else {}
        origins: dict[str, Origin] = {}
        asked = held = 0
        blocked, must_wait = self._blocked, self._must_wait()
        for sequence in list(scheduler.waiting):
            is_behind = blocked is not None and sequence.priority_key >= blocked.priority_key
            if asked == _MOST_ASKING or held == _MOST_HELD or (is_behind and must_wait):
                break
            if sequence.asking and sequence.preempted:
                break
            if sequence.asking or scheduler.parked(sequence):
                continue
            way = self._way(sequence, origins)
            neighbours = filling.setdefault(sequence.opening, [])
            if way.waits or (way is ENSURE and self._held(sequence, neighbours)):
                held += 1
                continue
            if room == 0:
                victim = self._victim(sequence)
                if victim is None:
                    break
                found.append(self._preempt(victim))
                room = 1
            found.append(self._ask(sequence, way))
            room, asked = room - 1, asked + 1
            neighbours.append(sequence)
            if is_behind or sequence.preempted:
                # One at a time, or smaller ones would take, again and again, what it waits for.
                break
        return found

    def _must_wait(self) -> bool:
        """Whether the blocked one, and all behind it, may not ask in this turn."""
        if self._blocked is None or self._now < self._ask_after:
            return self._blocked is not None
        return any(sequence.asking for sequence in self._scheduler.waiting)

    def _ask(self, sequence: Sequence, way: Way) -> kv.Call:
        sequence.asking = True
        # A page for each running sequence stays free, so that admitting one does not evict another at once.
        page_size, keep_free = self._scheduler.page_size, len(self._scheduler.running)
        sequence.forking = way.source
        if way.source is not None:
            return calls.fork(sequence, way.source, page_size, keep_free)
        return calls.ensure(sequence, page_size, keep_free)

    def _way(self, sequence: Sequence, origins: dict[str, Origin]) -> Way:
        """origins: by key; what was found in this turn already."""
        request = sequence.request
        has_own = bool(sequence.length) and self._prefix_cache
        if not self._fork or len(request.sequences) == 1 or has_own or not sequence.forkable:
            return ENSURE
        origin = origins.get(request.key)
        if origin is None:
            origin = origins[request.key] = origin_of(request, self._scheduler.parked)
        return way_of(sequence, origin)

    def _held(self, sequence: Sequence, neighbours: list[Sequence]) -> bool:
        """Whether a neighbour is about to fill the page that it would match next."""
        if not self._prefix_cache or not neighbours or sequence.preempted:
            return False
        if sequence.held_until == 0.0:
            sequence.held_until = self._now + _HOLD_SECONDS
        return self._now < sequence.held_until and self._scheduler.shares_unfilled_page(sequence, neighbours)

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """Who makes a lane free for it."""
        scheduler = self._scheduler
        return choose_victim(scheduler.running, scheduler.resting(), scheduler.page_size, sequence.priority)
