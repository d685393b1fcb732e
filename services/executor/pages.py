"""Rows for the scheduler's sequences: asks the manager ahead of need, and makes room when there is none.

grow       every running row is kept two pages ahead of its next step, all in one call a turn
admit      a waiting sequence asks for its whole prompt at once (`admission`)
make room  for rows that lack a page, else for a waiting sequence of higher priority: unwritten headroom
           of all rows is given back first; if that was not enough, one of them loses its row and
           computes again later (`preemption`)
"""

from __future__ import annotations

import structlog

from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime import failpoint
from services.executor import calls, grants, publisher
from services.executor.admission import Admission
from services.executor.grants import Grant
from services.executor.preemption import choose_victim
from services.executor.requests import Requests
from services.executor.runner.base import Runner
from services.executor.scheduler import Scheduler
from services.executor.sequence import Phase, Sequence
from services.executor.shared import SharedPool

log = structlog.get_logger()


class Pages:
    """The step thread's dealings with the page pool."""

    def __init__(
        self,
        scheduler: Scheduler,
        requests: Requests,
        runner: Runner,
        pool: SharedPool,
        prefix_cache: bool,
        fork: bool = True,
    ) -> None:
        """fork: outputs of one request share the pages of their prompt."""
        self._scheduler = scheduler
        self._requests = requests
        self._runner = runner
        self._pool = pool
        self._admission = Admission(scheduler, prefix_cache, fork, self.preempt)
        self.preemptions = 0

    def ensure(self, now: float) -> list[kv.Call]:
        """The calls of this turn. now: monotonic seconds."""
        self._admission.begin(now)
        starved = [sequence for sequence in self._scheduler.running if sequence.starved]
        # Nobody else asks in the turn that makes room, or it would be gone before those it is for.
        if made := self._make_room(starved):
            return made
        return self._grow() + ([] if starved else self._admission.calls())

    def _grow(self) -> list[kv.Call]:
        scheduler = self._scheduler
        page_size = scheduler.page_size
        short: list[Sequence] = []
        for sequence in scheduler.running:
            if sequence.starved or sequence.asking or sequence.known < sequence.ask_from:
                continue
            if sequence.capacity < min(sequence.known + page_size, sequence.limit) and not scheduler.parked(sequence):
                sequence.asking = True
                short.append(sequence)
        return [calls.ensure_rows(short, page_size)] if short else []

    def freed(self) -> None:
        """Pages may have come back."""
        self._admission.freed()

    # --- answers ---

    def ensured(self, call: kv.EnsureRequest, reply: kv.Reply) -> None:
        """The manager's answer to an `ensure`."""
        grant = grants.of_ensure(reply.ensure) if reply.HasField("ensure") else None
        self._answered(call.key, call.index, reply, grant)

    def forked(self, call: kv.ForkRequest, reply: kv.Reply) -> None:
        """The manager's answer to a `fork`."""
        source = self._requests.sequence(call.key, call.from_index)
        grant = grants.of_fork(reply.fork, source) if reply.HasField("fork") else None
        if grant is None and reply.error.reason == kv.ERROR_REASON_INVALID:
            log.error("manager refused a fork", key=call.key, index=call.index, reason=reply.error.message)
            grant = grants.GONE
        self._answered(call.key, call.index, reply, grant)

    def _answered(self, key: str, index: int, reply: kv.Reply, grant: Grant | None) -> None:
        sequence = self._requests.sequence(key, index)
        if sequence is not None:
            sequence.asking, sequence.forking = False, None
        if sequence is None or sequence.phase is Phase.ENDED:
            if grant is not None and grant.generation:
                self._requests.call(calls.close_row(key, index, grant.generation))
        elif grant is None:
            self._refused(sequence, reply.error)
        elif grant.generation:
            self._start(sequence, grant)
        else:
            sequence.forkable = False  # asks `ensure` instead

    def _start(self, sequence: Sequence, grant: Grant) -> None:
        grants.settle(sequence, grant, self._pool, self._runner)
        if sequence.preempted:
            sequence.resumed_at = sequence.committed
        self._scheduler.start(sequence)

    def _refused(self, sequence: Sequence, error: kv.Error) -> None:
        if error.reason in (kv.ERROR_REASON_NO_PAGES, kv.ERROR_REASON_NO_ROWS):
            self._admission.refused(sequence)
        else:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: kv.Error) -> None:
        log.error("manager refused pages", key=sequence.request.key, index=sequence.index, reason=error.message)
        self._requests.fail(sequence.request, error.reason)

    def grown(self, call: kv.EnsureRowsRequest, reply: kv.Reply) -> None:
        """The manager's answer to an `ensure_rows`. What it says of a row that was given up since is dropped."""
        by_row = {sequence.row: sequence for sequence in self._scheduler.running}
        held = reply.ensure_rows.capacities if reply.HasField("ensure_rows") else [0] * len(call.rows)
        for row, generation, asked, capacity in zip(
            call.rows, call.row_generations, call.capacities, held, strict=True
        ):
            sequence = by_row.get(row)
            if sequence is None or sequence.row_generation != generation:
                continue
            sequence.asking = False
            if reply.HasField("ensure_rows"):
                self._grown(sequence, asked, capacity)
            else:
                self._fail(sequence, reply.error)

    def _grown(self, sequence: Sequence, asked: int, capacity: int) -> None:
        if not capacity:
            # The manager knows no such row. What is known goes on in another one.
            log.error("row is gone", key=sequence.request.key, index=sequence.index)
            self._requests.call(self.preempt(sequence))
            return
        # No headroom to be had: ask again only when the next step needs it.
        sequence.ask_from = sequence.capacity if capacity == sequence.capacity else 0
        sequence.capacity = capacity
        # Headroom is a wish: only a step that cannot run makes a sequence starve.
        sequence.starved = capacity < asked and capacity < sequence.known

    # --- making room ---

    def _make_room(self, starved: list[Sequence]) -> list[kv.Call]:
        """Makes room for starved rows, else for the waiting sequence that somebody must yield to."""
        running = self._scheduler.running
        pressing = None if starved else self._admission.pressing()
        # Once every answer is in: one on its way may change the choice.
        if pressing is None and (not starved or any(sequence.asking for sequence in running)):
            return []
        parked = self._scheduler.resting()
        for sequence in parked:
            sequence.starved = False  # asks again when somebody reads it
        starved = [sequence for sequence in starved if sequence.starved]
        if pressing is None and not starved:
            return []
        room = self._give_back(pressing) or self._take_row(parked, pressing)
        if not room:
            return []
        # Who has just lost its row asks for another one, later.
        starved = [sequence for sequence in starved if sequence.phase is Phase.RUNNING]
        for sequence in starved:
            sequence.starved, sequence.asking = False, True
        if starved:
            room.append(calls.ensure_rows(starved, self._scheduler.page_size))
        if pressing is not None:
            room.append(self._admission.ask(pressing))
        return room

    def _give_back(self, pressing: Sequence | None) -> list[kv.Call]:
        """Unwritten headroom of all rows; once for each waiting sequence, for they ask for it again."""
        if pressing is not None:
            if self._admission.squeezed:
                return []
            self._admission.squeezed = True
        page_size = self._scheduler.page_size
        found: list[kv.Call] = []
        for sequence in self._scheduler.running:
            kept = -(-sequence.known // page_size) * page_size
            # An answer on its way would tell a capacity from before the trim.
            if sequence.capacity > kept and not sequence.asking:
                sequence.capacity = kept
                found.append(calls.trim(sequence, kept))
        return found

    def _take_row(self, parked: list[Sequence], pressing: Sequence | None) -> list[kv.Call]:
        scheduler = self._scheduler
        below = pressing.priority if pressing is not None else None
        victim = choose_victim(scheduler.running, parked, scheduler.page_size, below)
        return [self.preempt(victim)] if victim is not None else []

    def preempt(self, sequence: Sequence) -> kv.Call:
        """Takes the row away; what is sealed stays cached and may be found again."""
        self.preemptions += 1
        return self._lose_row(sequence)

    def lose_all(self) -> None:
        """The pool's memory is gone, and all rows with it: what is known is computed again."""
        for sequence in list(self._scheduler.running):
            sequence.request.recomputed = True
            publisher.mark(sequence)
            self._lose_row(sequence)

    def _lose_row(self, sequence: Sequence) -> kv.Call:
        sequence.preempted = True
        failpoint.hit("executor.preempt.before")
        sequence.log.set_progress(0, sequence.committed)  # before the close that ends the row
        failpoint.hit("executor.preempt.after")
        self._scheduler.preempt(sequence)
        return self._requests.give_up(sequence)
