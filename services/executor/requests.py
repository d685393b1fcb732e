"""Every request in memory: from open to end, attached to a stream or detached.

    opening    `open` is on its way; the stream is told `accepted` when it is answered
    live       sequences wait, run or are parked
    ended      terminal words stored; dropped from memory once its stream has read it.
               The files stay with the manager for `record_ttl`, and are read again for whoever asks.

A request without a stream is detached; when its grace is over it is cancelled.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Final

import structlog
from google.protobuf.message import DecodeError

from kvmanager.layout import Reason, request_key
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime import failpoint
from pagehold.v1 import inference_pb2 as api
from services.executor import publisher
from services.executor.openings import Openings
from services.executor.publisher import Connection, fail
from services.executor.runner.base import Runner
from services.executor.scheduler import Scheduler
from services.executor.sequence import Phase, Request, Sequence, load
from services.executor.shared import SharedPool

log = structlog.get_logger()

LOST_FRONTEND_GRACE: Final = 30.0  # seconds; a frontend that died took all its streams with it
_MOST_LIVE: Final = 8192  # requests in memory; beyond it new ones are refused
_LONGEST_MS: Final = 10**12  # thirty years: a longer deadline is none, and must fit its field


class Requests:
    """The step thread's table of requests; calls for the manager gather in it until the turn ends."""

    def __init__(
        self,
        scheduler: Scheduler,
        pool: SharedPool,
        runner: Runner,
        records: Path,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._runner = runner
        self._records = records
        self._eos = eos_token_ids
        self._live: dict[str, Request] = {}
        self._opening = Openings()
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
        request = self._live.get(key)
        return request.sequences[index] if request is not None else None

    def end(self, sequence: Sequence, reason: Reason, length: int) -> None:
        """Stores the terminal word and gives the row back."""
        failpoint.hit("executor.finish.before")
        sequence.log.set_terminal(reason, length)
        failpoint.hit("executor.finish.after")
        self._scheduler.remove(sequence)
        if sequence.row >= 0:
            request, generation = sequence.request, sequence.row_generation
            close = kv.CloseRequest(key=request.key, index=sequence.index, row_generation=generation)
            self.call(kv.Call(close=close))
            self._pool.unbind(sequence)
        publisher.mark(sequence)

    def cancel(self, request: Request) -> None:
        for sequence in request.sequences:
            if sequence.phase is not Phase.ENDED:
                self.end(sequence, Reason.CANCELLED, sequence.length)

    def fail(self, request: Request, reason: kv.ErrorReason) -> None:
        """The manager refuses pages for good: an honest end, not a silent wait."""
        self._tell(request, *_ENSURE_FAILURES.get(reason, (ex.FAILURE_NOT_FOUND, "")))
        self.cancel(request)

    # --- what frontends send ---

    def handle(self, connection: Connection, message: ex.ConnectRequest) -> None:
        match message.WhichOneof("message"):
            case "submit":
                self._submit(connection, message.submit)
            case "attach":
                self._attach(connection, message.attach)
            case "detach":
                self._detach(connection, message.detach)
            case "cancel":
                self._cancel(request_key(message.cancel.tenant, message.cancel.request_id))
            case "stop_at":
                self._stop_at(message.stop_at)

    def _submit(self, connection: Connection, submit: ex.Submit) -> None:
        try:
            message = api.GenerateRequest.FromString(submit.request)
        except DecodeError:
            # Not worth a life: the frontend would send it to the next executor as well.
            log.error("a frontend submitted what is no request", stream_id=submit.stream_id)
            fail(connection, submit.stream_id, ex.FAILURE_UNSPECIFIED)
            return
        key = request_key(submit.tenant, message.request_id)
        digest = self._opening[key].digest if key in self._opening else None
        if key in self._live:
            digest = self._live[key].record.digest
        if digest is not None and digest != submit.digest:
            fail(connection, submit.stream_id, ex.FAILURE_ALREADY_EXISTS)
        elif key in self._live:
            self._accept(self._live[key], connection, submit.stream_id, 0)
        elif key in self._opening:
            self._opening.take_over(key, connection, submit.stream_id, None)
        elif refusal := self._refusal(submit):
            fail(connection, submit.stream_id, *refusal)
        else:
            self._open(connection, submit, message, key)

    def _refusal(self, submit: ex.Submit) -> tuple[ex.Failure, str] | None:
        longest = (self._pool.pages - 1) * self._pool.page_size
        if len(submit.prompt) + submit.max_tokens - 1 > longest:
            detail = f"prompt and max_tokens need more than the {longest} tokens that the page pool holds"
            return ex.FAILURE_TOO_LARGE, detail
        if len(self._live) + len(self._opening) >= _MOST_LIVE or self._opening.is_full:
            return ex.FAILURE_OVERLOADED, "too many requests are open"
        return None

    def _open(self, connection: Connection, submit: ex.Submit, message: api.GenerateRequest, key: str) -> None:
        now = time.monotonic_ns()
        sampling = message.sampling
        record = kv.RequestRecord(
            tenant=submit.tenant,
            request_id=message.request_id,
            request=submit.request,
            prompt=submit.prompt,
            seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
            digest=submit.digest,
            deadline_ns=now + min(submit.timeout_ms, _LONGEST_MS) * 1_000_000 if submit.timeout_ms else 0,
            outputs=message.n if message.HasField("n") else 1,
            max_tokens=submit.max_tokens,
            logprobs=message.response.logprobs,
            created_ns=now,
        )
        self._opening.begin(key, connection, submit.stream_id, submit.digest, record.ByteSize())
        self.call(kv.Call(open=kv.OpenRequest(record=record)))

    def opened(self, call: kv.OpenRequest, reply: kv.Reply) -> None:
        """The manager's answer to an `open`."""
        key = request_key(call.record.tenant, call.record.request_id)
        opening = self._opening.end(key)
        connection, stream_id = opening.connection, opening.stream_id
        if reply.WhichOneof("reply") == "error":
            log.info("request refused by the manager", key=key, reason=reply.error.message)
            if connection is not None:
                failure = _OPEN_FAILURES.get(reply.error.reason, (ex.FAILURE_OVERLOADED, ""))
                fail(connection, stream_id, *failure)
            return
        request = self._find(key)
        if request is None:
            # Forgotten between the answer and now: as good as never opened.
            if connection is not None:
                fail(connection, stream_id, ex.FAILURE_NOT_FOUND)
            return
        self._register(request)
        if connection is None:
            request.expires = opening.expires
        elif opening.attach is not None:
            self._attach(connection, opening.attach)
        else:
            self._accept(request, connection, stream_id, reply.open.cached_tokens)
        if opening.cancelled:
            self.cancel(request)

    def _attach(self, connection: Connection, attach: ex.Attach) -> None:
        key = request_key(attach.tenant, attach.request_id)
        if key in self._opening:
            self._opening.take_over(key, connection, attach.stream_id, attach)
            return
        request = self._find(key)
        if request is None:
            fail(connection, attach.stream_id, ex.FAILURE_NOT_FOUND)
            return
        positions = {position.index: position.offset for position in attach.positions}
        for index, offset in positions.items():
            if index >= len(request.sequences) or offset > request.sequences[index].length:
                fail(connection, attach.stream_id, ex.FAILURE_OUT_OF_RANGE)
                return
        self._register(request)
        for sequence in request.sequences:
            # A reader that has not seen the request needs its text from the start.
            sequence.cursor = 0 if attach.describe else positions.get(sequence.index, 0)
        publisher.attach(request, connection, attach.stream_id, attach.describe)

    def _detach(self, connection: Connection, detach: ex.Detach) -> None:
        request = connection.streams.get(detach.stream_id)
        expires = time.monotonic() + detach.grace_ms / 1000
        if request is None:
            self._opening.detach(connection, detach.stream_id, expires)
            return
        publisher.detach(request)
        request.expires = expires
        self._drop_if_ended(request)

    def _cancel(self, key: str) -> None:
        if key in self._opening:
            self._opening[key].cancelled = True
        elif (request := self._find(key)) is not None and not request.ended:
            self._register(request)
            self.cancel(request)

    def _stop_at(self, stop: ex.StopAt) -> None:
        key = request_key(stop.tenant, stop.request_id)
        if key in self._opening:
            return  # nothing of it was ever sent, so there is nothing to end
        request = self._find(key)
        if request is None or stop.index >= len(request.sequences):
            return
        if not request.ended:
            self._register(request)
        sequence = request.sequences[stop.index]
        if stop.length > sequence.length:
            return  # tokens that were never committed, or that lie beyond an end which readers may know
        if sequence.phase is not Phase.ENDED:
            self.end(sequence, Reason.STOP, stop.length)
        else:
            # One store, and only ever to a shorter end: a reader that knows the later end finds the stop string
            # before it by itself.
            sequence.log.set_terminal(Reason.STOP, stop.length)

    # --- streams and time ---

    def disconnected(self, connection: Connection, now: float) -> None:
        """A frontend is gone: its requests go on, detached."""
        for request in list(connection.streams.values()):
            publisher.detach(request)
            request.expires = now + LOST_FRONTEND_GRACE
            self._drop_if_ended(request)
        self._opening.detach(connection, None, now + LOST_FRONTEND_GRACE)

    def expire(self, now: float) -> None:
        """Deadlines, detached requests whose grace is over, and ended ones that were read."""
        if now < self._next_expiry:
            return
        self._next_expiry = now + 0.05
        now_ns = time.monotonic_ns()
        for request in list(self._live.values()):
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
            self._live.pop(request.key, None)

    # --- records ---

    def adopt(self, response: kv.AttachResponse, now: float) -> None:
        """Goes on with every open request that the shared files hold; those known already stay as they are."""
        recovered: dict[str, Request] = {}
        for key in response.keys:
            if key not in self._live and key not in self._opening:
                request = self._load(key)
                if request is not None:
                    recovered[key] = request
        for request in sorted(recovered.values(), key=lambda request: request.record.created_ns):
            self._arrivals += 1
            for sequence in request.sequences:
                sequence.arrival = self._arrivals
        for sequence in self._pool.find_rows(recovered):
            if sequence.phase is Phase.ENDED:
                close = kv.CloseRequest(
                    key=sequence.request.key, index=sequence.index, row_generation=sequence.row_generation
                )
                self.call(kv.Call(close=close))
                self._pool.unbind(sequence)
            else:
                sequence.phase = Phase.RUNNING
                self._runner.prepare(sequence.lane)
        for request in recovered.values():
            if not request.ended:
                self._register(request)
                # Whether it was its client or its frontend that had left is not known: the longer of the two.
                request.expires = now + max(LOST_FRONTEND_GRACE, request.message.response.detach_grace.ToSeconds())
        if recovered:
            log.info("requests recovered", requests=len(recovered), open=len(self._live), epoch=response.epoch)

    def _find(self, key: str) -> Request | None:
        return self._live.get(key) or self._load(key)

    def _load(self, key: str) -> Request | None:
        try:
            self._arrivals += 1
            return load(self._records, key, self._eos, self._arrivals)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, DecodeError) as error:
            # One damaged record must not keep all others from being served.
            log.error("damaged record left alone", key=key, error=type(error).__name__)
            return None

    def _register(self, request: Request) -> None:
        if request.key in self._live:
            return
        self._live[request.key] = request
        request.expires = time.monotonic() + LOST_FRONTEND_GRACE  # unless a stream takes it
        for sequence in request.sequences:
            if sequence.phase is not Phase.ENDED:
                if sequence.row < 0 and sequence.computed:
                    # No row, so nothing is computed: said before the first `ensure`, which relies on it.
                    sequence.computed = 0
                    sequence.log.set_progress(0, sequence.known)
                self._scheduler.add(sequence)

    def _accept(self, request: Request, connection: Connection, stream_id: int, cached: int) -> None:
        for sequence in request.sequences:
            sequence.cursor = 0
        publisher.attach(request, connection, stream_id, False)
        failpoint.hit("executor.accept.before")
        connection.outbox.accepted.add(
            stream_id=stream_id, prompt_tokens=len(request.record.prompt), cached_tokens=cached
        )

    def _tell(self, request: Request, failure: ex.Failure, detail: str) -> None:
        if request.connection is not None:
            fail(request.connection, request.stream_id, failure, detail)
            publisher.detach(request)


_OPEN_FAILURES = {
    kv.ERROR_REASON_ALREADY_EXISTS: (ex.FAILURE_ALREADY_EXISTS, ""),
    kv.ERROR_REASON_TOO_LARGE: (ex.FAILURE_TOO_LARGE, "the request does not fit the page pool"),
    kv.ERROR_REASON_QUOTA: (ex.FAILURE_OVERLOADED, "too many requests are kept; try again later"),
}
_ENSURE_FAILURES = {
    kv.ERROR_REASON_TOO_LARGE: (ex.FAILURE_TOO_LARGE, "the request does not fit the page pool"),
}
