"""Every request in memory: from open to end, attached to a stream or detached.

    opening    `open` is on its way; the stream is told `accepted` when it is answered
    live       sequences wait, run or are parked
    ended      terminal words stored; dropped from memory once its stream has read it.
               The files stay with the manager for `record_ttl`, and are read again for whoever asks.

A request without a stream is detached; when its grace is over it is cancelled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog
from google.protobuf.message import DecodeError

from kvmanager.layout import Reason
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime import failpoint
from pagehold.runtime.descriptors import is_scarcity
from services.executor import calls, publisher
from services.executor.openings import Openings
from services.executor.publisher import fail
from services.executor.runner.base import Runner
from services.executor.scheduler import Scheduler
from services.executor.sequence import Phase, Request, Sequence, load
from services.executor.shared import SharedPool

log = structlog.get_logger()

LOST_FRONTEND_GRACE: Final = 30.0  # seconds; a frontend that died took all its streams with it


class Requests:
    """The step thread's table of requests; calls for the manager gather in it until the turn ends."""

    def __init__(
        self,
        scheduler: Scheduler,
        pool: SharedPool,
        runner: Runner,
        records: Path,
        eos_token_ids: tuple[int, ...],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """clock: CLOCK_MONOTONIC in seconds."""
        self._scheduler = scheduler
        self._pool = pool
        self._runner = runner
        self._records = records
        self._eos = eos_token_ids
        self._clock = clock
        self.live: dict[str, Request] = {}  # by key
        self.openings = Openings()
        self._calls: list[kv.Call] = []
        self._arrivals = 0
        self._next_expiry = 0.0

    # --- what the engine asks for ---

    def take_calls(self) -> list[kv.Call]:
        calls, self._calls = self._calls, []
        return calls

    def call(self, call: kv.Call) -> None:
        self._calls.append(call)

    def sequence(self, key: str, index: int) -> Sequence | None:
        request = self.live.get(key)
        return request.sequences[index] if request is not None else None

    def end(self, sequence: Sequence, reason: Reason, length: int) -> None:
        """Stores the terminal word and gives the row back."""
        failpoint.hit("executor.finish.before")
        sequence.log.set_terminal(reason, length)
        failpoint.hit("executor.finish.after")
        self._scheduler.remove(sequence)
        if sequence.row >= 0:
            self.call(self.give_up(sequence))
        publisher.mark(sequence)

    def give_up(self, sequence: Sequence) -> kv.Call:
        """Its row is not its own any more, and a step of it that is under way counts for nothing; the `close`."""
        close = calls.close(sequence)
        self._pool.unbind(sequence)
        sequence.settle(0)
        self._runner.release(sequence.lane)
        return close

    def cancel(self, request: Request) -> None:
        for sequence in request.sequences:
            if sequence.phase is not Phase.ENDED:
                self.end(sequence, Reason.CANCELLED, sequence.length)

    def fail(self, request: Request, reason: kv.ErrorReason) -> None:
        """The manager refuses pages for good: an honest end, not a silent wait."""
        self._tell(request, *_ENSURE_FAILURES.get(reason, (ex.FAILURE_NOT_FOUND, "")))
        self.cancel(request)

    # --- streams and time ---

    def detach(self, request: Request, expires: float) -> None:
        """Nobody reads it any more. expires: monotonic seconds; it is cancelled then, unless somebody does."""
        publisher.detach(request)
        request.expires = expires
        self._drop_if_ended(request)

    def expire(self, now: float) -> None:
        """Deadlines, detached requests whose grace is over, and ended ones that were read."""
        if now < self._next_expiry:
            return
        self._next_expiry = now + 0.05
        now_ns = int(now * 1e9)
        for request in list(self.live.values()):
            if not request.ended:
                deadline = request.record.deadline_ns
                if deadline and now_ns > deadline:
                    self._tell(request, ex.FAILURE_DEADLINE, "")
                    self.cancel(request)
                elif request.connection is None and now > request.expires:
                    self.cancel(request)
            self._drop_if_ended(request)

    def _drop_if_ended(self, request: Request) -> None:
        if not request.ended or any(sequence.asking for sequence in request.sequences):
            return
        if request.connection is None or all(sequence.end_sent for sequence in request.sequences):
            publisher.detach(request)
            self.live.pop(request.key, None)

    # --- records ---

    def adopt(self, response: kv.AttachResponse, now: float, beat: Callable[[], None] = lambda: None) -> None:
        """Goes on with every open request that the shared files hold; those known already stay as they are.

        beat: called after each of them.
        """
        recovered: dict[str, Request] = {}
        for key in response.keys:
            if key not in self.live and key not in self.openings:
                request = self._load(key)
                beat()
                failpoint.hit("executor.adopt.before")
                if request is not None:
                    recovered[key] = request
        for request in sorted(recovered.values(), key=lambda request: request.record.created_ns):
            self._arrivals += 1
            for sequence in request.sequences:
                sequence.arrival = self._arrivals
                # How far it was read is not known, and it must not rest until its frontend comes to say so.
                sequence.cursor = sequence.length
        for sequence in self._pool.find_rows(recovered):
            if sequence.phase is Phase.ENDED:
                self.call(calls.close(sequence))
                self._pool.unbind(sequence)
            else:
                sequence.phase = Phase.RUNNING
                sequence.settle(sequence.computed)
                self._runner.prepare(sequence.lane, sequence.committed)
        for request in recovered.values():
            if not request.ended:
                self.register(request)
                # Whether it was its client or its frontend that had left is not known: the longer of the two.
                request.expires = now + max(LOST_FRONTEND_GRACE, request.message.response.detach_grace.ToSeconds())
        failpoint.hit("executor.adopt.after")
        if recovered:
            log.info("requests recovered", requests=len(recovered), open=len(self.live), epoch=response.epoch)

    def find(self, key: str) -> Request | None:
        return self.live.get(key) or self._load(key)

    def _load(self, key: str) -> Request | None:
        try:
            self._arrivals += 1
            return load(self._records, key, self._eos, self._arrivals)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, DecodeError) as error:
            if is_scarcity(error):
                raise  # of this process's: the next one may have what it takes
            # One damaged record must not keep all others from being served.
            log.error("damaged record left alone", key=key, error=type(error).__name__)
            return None

    def register(self, request: Request) -> None:
        if request.key in self.live:
            return
        self.live[request.key] = request
        request.expires = self._clock() + LOST_FRONTEND_GRACE  # unless a stream takes it
        for sequence in request.sequences:
            if sequence.phase is not Phase.ENDED:
                if sequence.row < 0 and sequence.computed:
                    # No row, so nothing is computed: said before the first `ensure`, which relies on it.
                    request.recomputed = True
                    sequence.settle(0)
                    sequence.log.set_progress(0, sequence.committed)
                self._scheduler.add(sequence)

    def _tell(self, request: Request, failure: ex.Failure, detail: str) -> None:
        if request.connection is not None:
            fail(request.connection, request.stream_id, failure, detail)
            publisher.detach(request)


_ENSURE_FAILURES = {
    kv.ERROR_REASON_TOO_LARGE: (ex.FAILURE_TOO_LARGE, "the request does not fit the page pool"),
}
