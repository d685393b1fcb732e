"""Tokens to the frontends: for each connection at most one message a step, made from the logs.

There is no queue of tokens: a stream's position is a cursor over the log. A connection whose
last messages are not yet written is left out of a step, and its cursors catch up later, so
what is held for a slow frontend stays bounded. So is one whose last message was only just made:
where a step takes less time than a reader notices, fewer messages with more tokens leave the
processors to the steps. First tokens, ends and answers do not wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.runtime import failpoint
from services.executor.sequence import Phase, Request, Sequence

_MOST_IN_FLIGHT: Final = 4  # messages handed to a connection's writer and not yet written
# In one message, so that a resumed crowd stays below the message limit.
_MOST_TOKENS: Final = 65536
_MOST_RECORD_BYTES: Final = 16 << 20


class Connection:
    """A frontend's stream. Made on the event loop; `offer` is called by the step thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_written: Callable[[], None]) -> None:
        self._loop = loop
        self._on_written = on_written
        self._queue: asyncio.Queue[ex.ConnectResponse] = asyncio.Queue()
        self._offered = 0  # counted by the step thread alone
        self._written = 0  # counted by the event loop alone
        self.streams: dict[int, Request] = {}  # by stream id; the step thread's
        self.outbox = ex.ConnectResponse()  # answers that are not tokens; the step thread's
        self.dirty: dict[Sequence, None] = {}  # have tokens or an end to send, in order
        self.sent_at = 0.0  # the last message; the step thread's
        self.closed = False

    @property
    def has_room(self) -> bool:
        return self._offered - self._written < _MOST_IN_FLIGHT

    @property
    def is_urgent(self) -> bool:
        """Somebody waits for what there is to send."""
        return self.outbox.ByteSize() > 0 or any(
            sequence.cursor == 0 or sequence.phase is Phase.ENDED for sequence in self.dirty
        )

    def offer(self, message: ex.ConnectResponse) -> None:
        self._offered += 1
        self._loop.call_soon_threadsafe(self._queue.put_nowait, message)

    async def take(self) -> ex.ConnectResponse:
        """The next message for the writer, which calls `written` after it."""
        return await self._queue.get()

    def written(self) -> None:
        self._written += 1
        if self._offered - self._written == _MOST_IN_FLIGHT - 1:
            self._on_written()


def attach(request: Request, connection: Connection, stream_id: int, describe: bool) -> None:
    """The newest stream wins; the older one is told and detaches nothing."""
    previous = request.connection
    if previous is not None and (previous is not connection or request.stream_id != stream_id):
        previous.streams.pop(request.stream_id, None)
        for sequence in request.sequences:
            previous.dirty.pop(sequence, None)
        fail(previous, request.stream_id, ex.FAILURE_TAKEN_OVER)
    request.connection, request.stream_id, request.describe = connection, stream_id, describe
    connection.streams[stream_id] = request
    connection.sent_at = 0.0  # who comes, or comes back, waits for nothing
    for sequence in request.sequences:
        sequence.end_sent = False
        connection.dirty[sequence] = None


def detach(request: Request) -> None:
    connection = request.connection
    if connection is not None:
        connection.streams.pop(request.stream_id, None)
        for sequence in request.sequences:
            connection.dirty.pop(sequence, None)
    request.connection = None


def fail(connection: Connection, stream_id: int, failure: ex.Failure, detail: str = "") -> None:
    """Ends a stream. detail: safe to show to the client."""
    connection.outbox.failed.add(stream_id=stream_id, failure=failure, detail=detail)


def mark(sequence: Sequence) -> None:
    """The sequence has something new for its stream, if it has one."""
    connection = sequence.request.connection
    if connection is not None:
        connection.dirty[sequence] = None


def publish(connections: list[Connection], now: float, interval: float) -> None:
    """Sends each connection what its cursors have not passed yet.

    now, interval: seconds; what can wait goes `interval` after the last message.
    """
    for connection in connections:
        pending = connection.dirty or connection.outbox.ByteSize()
        if connection.closed or not pending or not connection.has_room:
            continue
        if now < connection.sent_at + interval and not connection.is_urgent:
            continue
        connection.sent_at = now
        message = connection.outbox
        connection.outbox = ex.ConnectResponse()
        _fill(connection, message)
        failpoint.hit("executor.publish.before")
        connection.offer(message)
        failpoint.hit("executor.publish.after")


def _fill(connection: Connection, message: ex.ConnectResponse) -> None:
    dirty, run = connection.dirty, message.tokens
    logprobs_wanted = any(sequence.log.logprobs is not None for sequence in dirty)
    # Columns are extended once: an append to a repeated field costs several times one to a list.
    stream_ids: list[int] = []
    indexes: list[int] = []
    offsets: list[int] = []
    counts: list[int] = []
    token_ids: list[int] = []
    logprobs: list[float] = []
    sent: list[Sequence] = []
    record_bytes = 0
    for sequence in dirty:
        request, log = sequence.request, sequence.log
        if request.describe:
            request.describe = False
            _add_record(message, request)
            record_bytes += len(request.record.request)
        if request.recomputed:
            request.recomputed = False
            message.recomputed.append(request.stream_id)
        start, end = sequence.cursor, sequence.length
        if start < end:
            first, last = sequence.prompt_length + start, sequence.prompt_length + end
            stream_ids.append(request.stream_id)
            indexes.append(sequence.index)
            offsets.append(start)
            counts.append(end - start)
            token_ids += log.tokens[first:last].tolist()
            if logprobs_wanted:
                logprobs += [0.0] * (end - start) if log.logprobs is None else log.logprobs[first:last].tolist()
            sequence.cursor = end
        if sequence.phase is Phase.ENDED and not sequence.end_sent:
            _add_end(message, sequence)
            sequence.end_sent = True
        sent.append(sequence)
        if len(token_ids) > _MOST_TOKENS or record_bytes > _MOST_RECORD_BYTES:
            break
    run.stream_ids.extend(stream_ids)
    run.indexes.extend(indexes)
    run.offsets.extend(offsets)
    run.counts.extend(counts)
    run.token_ids.extend(token_ids)
    run.logprobs.extend(logprobs)
    if len(sent) == len(dirty):
        dirty.clear()
    else:
        for sequence in sent:
            del dirty[sequence]


def _add_record(message: ex.ConnectResponse, request: Request) -> None:
    message.records.add(
        stream_id=request.stream_id, request=request.record.request, prompt_tokens=len(request.record.prompt)
    )


def _add_end(message: ex.ConnectResponse, sequence: Sequence) -> None:
    message.ended.add(
        stream_id=sequence.request.stream_id,
        index=sequence.index,
        reason=int(sequence.log.reason),  # the numbers are the same
        length=sequence.log.final_length,
        cached_tokens=sequence.cached_tokens,
    )
