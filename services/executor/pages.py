"""Rows for the scheduler's sequences: asks the manager ahead of need, and makes room when there is none.

ensure     every running row is kept two pages ahead of its next step; a waiting sequence
           asks for its whole prompt at once
refused    unwritten headroom of all rows is given back first; if that was not enough, a parked
           sequence or else the last in order loses its row and computes again later
"""

from __future__ import annotations

from math import inf
from typing import Final

import structlog

from pagehold.kv.v1 import kv_manager_pb2 as kv
from services.executor.requests import Requests
from services.executor.runner.base import Runner
from services.executor.scheduler import Scheduler
from services.executor.sequence import Phase, Sequence
from services.executor.shared import SharedPool

log = structlog.get_logger()

_HEADROOM_PAGES: Final = 2
_HOLD_SECONDS: Final = 5.0  # how long a request waits for a neighbour to fill a page that it would share
_RETRY_SECONDS: Final = 0.05
_MOST_ASKING: Final = 16  # admissions on their way at once
_MOST_HELD: Final = 256  # held requests that are looked at in one turn


class Pages:
    """The step thread's dealings with the page pool."""

    def __init__(
        self, scheduler: Scheduler, requests: Requests, runner: Runner, pool: SharedPool, prefix_cache: bool
    ) -> None:
        self._scheduler = scheduler
        self._requests = requests
        self._runner = runner
        self._pool = pool
        self._prefix_cache = prefix_cache
        self._now = 0.0
        self._admit_after = 0.0  # infinite: not before pages come back
        self._blocked: Sequence | None = None  # the first in order that found the pool full
        self.preemptions = 0

    def ensure(self, now: float) -> list[kv.Call]:
        """The calls of this turn."""
        self._now = now
        if self._blocked is not None and self._blocked.phase is not Phase.WAITING:
            self._blocked = None
            self.freed()  # for those behind it the pool may do
        calls = self._relieve()
        scheduler = self._scheduler
        page_size, starving = scheduler.page_size, False
        for sequence in scheduler.running:
            if sequence.starved:
                starving = True
            elif sequence.asking or sequence.known < sequence.ask_from:
                continue
            elif sequence.capacity < min(sequence.known + page_size, sequence.limit) and not scheduler.parked(sequence):
                calls.append(self._ask(sequence, 0))
        if not starving and now >= self._admit_after:
            calls += self._admit(now)
        return calls

    def _ask(self, sequence: Sequence, keep_free: int) -> kv.Call:
        need = min(sequence.known + 1, sequence.limit)
        headroom = min(_HEADROOM_PAGES * self._scheduler.page_size, sequence.limit - need)
        sequence.asking = True
        return kv.Call(
            ensure=kv.EnsureRequest(
                key=sequence.request.key,
                index=sequence.index,
                row_generation=sequence.row_generation,
                capacity=need,
                headroom=max(headroom, 0),
                keep_free=keep_free,
            )
        )

    # --- admission ---

    def _admit(self, now: float) -> list[kv.Call]:
        """Asks for rows in order; nobody overtakes one that found the pool full."""
        scheduler = self._scheduler
        room = min(scheduler.admissible(), _MOST_ASKING)
        if self._blocked is not None:
            # One at a time, or smaller ones would take, again and again, what it waits for.
            room = 0 if any(sequence.asking for sequence in scheduler.waiting) else min(room, 1)
        if room <= 0:
            return []
        calls: list[kv.Call] = []
        filling = scheduler.filling() if self._prefix_cache else {}
        held = 0
        for sequence in scheduler.waiting:
            if len(calls) == room or held == _MOST_HELD:
                break
            if sequence.asking or scheduler.parked(sequence):
                continue
            neighbours = filling.setdefault(sequence.opening, [])
            if self._held(sequence, neighbours, now):
                held += 1
                continue
            # A page for each running sequence stays free, so that admitting one does not evict another at once.
            calls.append(self._ask(sequence, len(scheduler.running)))
            neighbours.append(sequence)
        return calls

    def _held(self, sequence: Sequence, neighbours: list[Sequence], now: float) -> bool:
        if not self._prefix_cache or not neighbours:
            return False
        if sequence.held_until == 0.0:
            sequence.held_until = now + _HOLD_SECONDS
        return now < sequence.held_until and self._scheduler.shares_unfilled_page(sequence, neighbours)

    # --- answers ---

    def ensured(self, call: kv.EnsureRequest, reply: kv.Reply) -> None:
        """The manager's answer to an `ensure`."""
        sequence = self._requests.sequence(call.key, call.index)
        granted = reply.WhichOneof("reply") == "ensure"
        if sequence is not None:
            sequence.asking = False
        if sequence is None or sequence.phase is Phase.ENDED:
            if granted:
                generation = reply.ensure.row_generation
                close = kv.CloseRequest(key=call.key, index=call.index, row_generation=generation)
                self._requests.call(kv.Call(close=close))
        elif granted:
            self._granted(sequence, reply.ensure)
        elif reply.error.reason in (kv.ERROR_REASON_NO_PAGES, kv.ERROR_REASON_NO_ROWS):
            self._refused(sequence)
        else:
            log.error("manager refused pages", key=call.key, index=call.index, reason=reply.error.message)
            self._requests.fail(sequence.request, reply.error.reason)

    def _granted(self, sequence: Sequence, granted: kv.EnsureResponse) -> None:
        if not granted.capacity:
            # The manager knows no such row. What is known goes on in another one.
            log.error("row is gone", key=sequence.request.key, index=sequence.index)
            self._requests.call(self.preempt(sequence))
            return
        sequence.starved = False
        # No headroom to be had: ask again only when the next step needs it.
        sequence.ask_from = sequence.capacity if granted.capacity == sequence.capacity else 0
        sequence.capacity = granted.capacity
        if sequence.phase is Phase.WAITING:
            self._start(sequence, granted)

    def _start(self, sequence: Sequence, granted: kv.EnsureResponse) -> None:
        sequence.row, sequence.row_generation = granted.row, granted.row_generation
        if not sequence.preempted and not sequence.length:
            # Of the prompt alone: what a later row finds cached is the sequence's own work as well.
            sequence.cached_tokens = granted.cached_tokens
            sequence.log.set_cached_tokens(granted.cached_tokens)
        self._pool.bind(sequence)
        sequence.computed = self._pool.usable_computed(sequence)
        self._runner.prepare(sequence.lane)
        self._scheduler.start(sequence)

    def _refused(self, sequence: Sequence) -> None:
        if sequence.phase is Phase.RUNNING:
            # Headroom is a wish: only a step that cannot run makes a sequence starve.
            sequence.starved = sequence.capacity < sequence.known
            return
        if self._blocked is None or sequence.priority_key < self._blocked.priority_key:
            self._blocked = sequence
        # With nothing running, what holds the pages is not known here: asking at once would be asking for ever.
        self._admit_after = inf if self._scheduler.running else self._now + _RETRY_SECONDS
        if sequence is self._blocked:
            # Who rests for want of a reader gives way to who has one.
            idle = [other for other in self._scheduler.running if self._scheduler.parked(other) and not other.asking]
            if idle:
                self._requests.call(self.preempt(idle[-1]))

    def freed(self) -> None:
        """Pages may have come back: those who wait may try again."""
        self._admit_after = 0.0

    # --- making room ---

    def _relieve(self) -> list[kv.Call]:
        """Makes room for starved rows once every answer is in; an answer on its way may change the choice."""
        running = self._scheduler.running
        starved = [sequence for sequence in running if sequence.starved]
        if not starved or any(sequence.asking for sequence in running):
            return []
        idle = [sequence for sequence in running if self._scheduler.parked(sequence)]
        for sequence in idle:
            sequence.starved = False  # asks again when somebody reads it
        starved = [sequence for sequence in starved if sequence.starved]
        if not starved:
            return []
        calls = [call for sequence in running if (call := self._trim(sequence))]
        if not calls:
            victim = idle[-1] if idle else running[-1]
            calls.append(self.preempt(victim))
            starved = [sequence for sequence in starved if sequence is not victim]
        for sequence in starved:
            sequence.starved = False
            calls.append(self._ask(sequence, 0))
        return calls

    def _trim(self, sequence: Sequence) -> kv.Call | None:
        page_size = self._scheduler.page_size
        kept = -(-sequence.known // page_size) * page_size
        if sequence.capacity <= kept:
            return None
        sequence.capacity = kept
        trim = kv.TrimRequest(
            key=sequence.request.key, index=sequence.index, row_generation=sequence.row_generation, capacity=kept
        )
        return kv.Call(trim=trim)

    def preempt(self, sequence: Sequence) -> kv.Call:
        """Takes the row away; what is sealed stays cached and may be found again."""
        self.preemptions += 1
        sequence.preempted = True
        close = kv.CloseRequest(key=sequence.request.key, index=sequence.index, row_generation=sequence.row_generation)
        sequence.log.set_progress(0, sequence.known)  # before the close that ends the row
        self._pool.unbind(sequence)
        self._scheduler.preempt(sequence)
        return kv.Call(close=close)
