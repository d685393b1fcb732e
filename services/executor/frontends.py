"""What frontends send, and what becomes of it in the table of requests.

    submit    opens a request, or attaches to the one with the same id and body
    attach    goes on with a request at given offsets; the newest stream wins
    detach    the client is gone, its frontend is not: the request gets a grace, or is cancelled
    cancel    ends all outputs;  stop_at ends one, where its text ends

A message may come at any time: before the record is open, after the end, twice, too late.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Final

import structlog
from google.protobuf.message import DecodeError

from kvmanager.keys import request_key
from kvmanager.layout import Reason
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime import failpoint
from pagehold.v1 import inference_pb2 as api
from services.executor import publisher
from services.executor.publisher import Connection, fail
from services.executor.requests import LOST_FRONTEND_GRACE, Requests
from services.executor.sequence import Phase, Request
from services.executor.shared import SharedPool

log = structlog.get_logger()

_MOST_LIVE: Final = 8192  # requests in memory; beyond it new ones are refused
_LONGEST_MS: Final = 10**12  # thirty years: a longer deadline is none, and must fit its field


class Frontends:
    """The step thread's dealings with all frontends."""

    def __init__(
        self,
        requests: Requests,
        pool: SharedPool,
        prefix_cache: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """clock: CLOCK_MONOTONIC in seconds."""
        self._requests = requests
        self._openings = requests.openings
        self._pool = pool
        self._prefix_cache = prefix_cache
        self._clock = clock

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

    def disconnected(self, connection: Connection) -> None:
        """A frontend is gone: its requests go on, detached."""
        expires = self._clock() + LOST_FRONTEND_GRACE
        for request in list(connection.streams.values()):
            self._requests.detach(request, expires)
        self._openings.detach(connection, None, expires)

    # --- submit ---

    def _submit(self, connection: Connection, submit: ex.Submit) -> None:
        failpoint.hit("executor.submit.before")
        try:
            message = api.GenerateRequest.FromString(submit.request)
        except DecodeError:
            # Not worth a life: the frontend would send it to the next executor as well.
            log.error("a frontend submitted what is no request", stream_id=submit.stream_id)
            fail(connection, submit.stream_id, ex.FAILURE_UNSPECIFIED)
            return
        key = request_key(submit.tenant, message.request_id)
        live = self._requests.live.get(key)
        digest = self._openings[key].digest if key in self._openings else None
        if live is not None:
            digest = live.record.digest
        if digest is not None and digest != submit.digest:
            fail(connection, submit.stream_id, ex.FAILURE_ALREADY_EXISTS)
        elif live is not None:
            self._accept(live, connection, submit.stream_id, 0)
        elif key in self._openings:
            self._openings.take_over(key, connection, submit.stream_id, None)
        elif refusal := self._refusal(submit, message):
            fail(connection, submit.stream_id, *refusal)
        else:
            self._open(connection, submit, message, key)

    def _refusal(self, submit: ex.Submit, message: api.GenerateRequest) -> tuple[ex.Failure, str] | None:
        longest = (self._pool.pages - 1) * self._pool.page_size
        # Each output by itself: one that finds no room beside its siblings waits for them.
        if len(submit.prompt) + submit.max_tokens - 1 > longest:
            detail = f"prompt and max_tokens need more than the {longest} tokens that the page pool holds"
            return ex.FAILURE_TOO_LARGE, detail
        if message.pin_prefix and not self._prefix_cache:
            return ex.FAILURE_NO_PREFIX_CACHE, "a prefix cannot be reserved: this server does not cache prefixes"
        if len(self._requests.live) + len(self._openings) >= _MOST_LIVE or self._openings.is_full:
            return ex.FAILURE_OVERLOADED, "too many requests are open"
        return None

    def _open(self, connection: Connection, submit: ex.Submit, message: api.GenerateRequest, key: str) -> None:
        now = int(self._clock() * 1e9)
        sampling = message.sampling
        returned = message.n if message.HasField("n") else 1
        sampled = max(returned, message.best_of)
        record = kv.RequestRecord(
            tenant=submit.tenant,
            request_id=message.request_id,
            request=submit.request,
            prompt=submit.prompt,
            seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
            digest=submit.digest,
            deadline_ns=now + min(submit.timeout_ms, _LONGEST_MS) * 1_000_000 if submit.timeout_ms else 0,
            outputs=sampled,
            max_tokens=submit.max_tokens,
            # The best of several are told by them.
            logprobs=message.response.logprobs or sampled > returned,
            created_ns=now,
        )
        self._openings.begin(key, connection, submit.stream_id, submit.digest, record.ByteSize())
        self._requests.call(kv.Call(open=kv.OpenRequest(record=record)))

    def opened(self, call: kv.OpenRequest, reply: kv.Reply) -> None:
        """The manager's answer to an `open`."""
        key = request_key(call.record.tenant, call.record.request_id)
        opening = self._openings.end(key)
        connection, stream_id = opening.connection, opening.stream_id
        if reply.WhichOneof("reply") == "error":
            log.info("request refused by the manager", key=key, reason=reply.error.message)
            if connection is not None:
                failure = _OPEN_FAILURES.get(reply.error.reason, (ex.FAILURE_OVERLOADED, ""))
                fail(connection, stream_id, *failure)
            return
        request = self._requests.find(key)
        if request is None:
            # Forgotten between the answer and now: as good as never opened.
            if connection is not None:
                fail(connection, stream_id, ex.FAILURE_NOT_FOUND)
            return
        self._requests.register(request)
        if connection is None:
            request.expires = opening.expires
        elif opening.attach is not None:
            self._attach(connection, opening.attach)
        else:
            self._accept(request, connection, stream_id, reply.open.cached_tokens)
        if opening.cancelled:
            self._requests.cancel(request)

    def _accept(self, request: Request, connection: Connection, stream_id: int, cached: int) -> None:
        for sequence in request.sequences:
            sequence.cursor = 0
        publisher.attach(request, connection, stream_id, False)
        failpoint.hit("executor.accept.before")
        connection.outbox.accepted.add(
            stream_id=stream_id, prompt_tokens=len(request.record.prompt), cached_tokens=cached
        )

    # --- what is said of a request that may be there ---

    def _attach(self, connection: Connection, attach: ex.Attach) -> None:
        failpoint.hit("executor.resume.before")
        key = request_key(attach.tenant, attach.request_id)
        if key in self._openings:
            self._openings.take_over(key, connection, attach.stream_id, attach)
            return
        request = self._requests.find(key)
        if request is None:
            fail(connection, attach.stream_id, ex.FAILURE_NOT_FOUND)
            return
        positions = {position.index: position.offset for position in attach.positions}
        # A client's positions in ranked outputs are not those of the sampled ones: its frontend checks them.
        if not (attach.describe and request.is_ranked):
            for index, offset in positions.items():
                if index >= len(request.sequences) or offset > request.sequences[index].length:
                    fail(connection, attach.stream_id, ex.FAILURE_OUT_OF_RANGE)
                    return
        self._requests.register(request)
        for sequence in request.sequences:
            # A reader that has not seen the request needs its text from the start.
            sequence.cursor = 0 if attach.describe else positions.get(sequence.index, 0)
        publisher.attach(request, connection, attach.stream_id, attach.describe)
        failpoint.hit("executor.resume.after")

    def _detach(self, connection: Connection, detach: ex.Detach) -> None:
        failpoint.hit("executor.detach.before")
        request = connection.streams.get(detach.stream_id)
        expires = self._clock() + detach.grace_ms / 1000
        if request is None:
            self._openings.detach(connection, detach.stream_id, expires)
        else:
            self._requests.detach(request, expires)

    def _cancel(self, key: str) -> None:
        failpoint.hit("executor.cancel.before")
        if key in self._openings:
            self._openings[key].cancelled = True
        elif (request := self._requests.find(key)) is not None and not request.ended:
            self._requests.register(request)
            self._requests.cancel(request)

    def _stop_at(self, stop: ex.StopAt) -> None:
        failpoint.hit("executor.stop_at.before")
        key = request_key(stop.tenant, stop.request_id)
        if key in self._openings:
            return  # nothing of it was ever sent, so there is nothing to end
        request = self._requests.find(key)
        if request is None or stop.index >= len(request.sequences):
            return
        if not request.ended:
            self._requests.register(request)
        sequence = request.sequences[stop.index]
        if stop.length > sequence.length:
            return  # tokens that were never committed, or that lie beyond an end which readers may know
        if sequence.phase is not Phase.ENDED:
            self._requests.end(sequence, Reason.STOP, stop.length)
        else:
            # One store, and only ever to a shorter end: a reader that knows the later end finds the stop string
            # before it by itself.
            sequence.log.set_terminal(Reason.STOP, stop.length)


_OPEN_FAILURES = {
    kv.ERROR_REASON_ALREADY_EXISTS: (ex.FAILURE_ALREADY_EXISTS, ""),
    kv.ERROR_REASON_TOO_LARGE: (ex.FAILURE_TOO_LARGE, "the request does not fit the page pool"),
    kv.ERROR_REASON_QUOTA: (ex.FAILURE_OVERLOADED, "too many requests or reserved prefixes are kept; try again later"),
}
