"""One client's stream inside the frontend: expected offsets, text, and what waits to be written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import grpc
import structlog

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.v1 import inference_pb2 as api
from services.frontend.errors import RequestError, unavailable
from services.frontend.textstream import Decoder, TextStream

log = structlog.get_logger()

# A client is slow when one write to it takes this long while tokens pile up behind. A backlog
# alone is none of its fault: a stream that is resumed gets all its tokens at once.
SLOW_SECONDS: Final = 2.0

_REASONS = {
    ex.END_REASON_STOP: api.FINISH_REASON_STOP,
    ex.END_REASON_LENGTH: api.FINISH_REASON_LENGTH,
    ex.END_REASON_CANCELLED: api.FINISH_REASON_CANCELLED,
}


@dataclass(slots=True)
class Output:
    """One output of the request, as far as this stream has come."""

    index: int
    text: TextStream
    wanted_from: int = 0  # the client has what lies below
    received: int = 0  # tokens taken from the executor: the next offset expected
    ids: list[int] = field(default_factory=list)  # not yet written; the last of them is at `received` - 1
    logprobs: list[float] = field(default_factory=list)
    pending_text: str = ""
    ended: ex.Ended | None = None
    finished: bool = False  # `finished` has been handed to the writer

    @property
    def stopped(self) -> bool:
        """A stop string ended it; the executor may not know yet."""
        return self.text.stopped


class ClientStream:
    """Fed by the executor link, drained by the handler; both on the event loop."""

    def __init__(self, stream_id: int, request_id: str, decoder: Decoder, most_pending: int) -> None:
        self.stream_id = stream_id
        self.request_id = request_id
        self.message = api.GenerateRequest()
        self.outputs: list[Output] = []
        self.submit: ex.Submit | None = None  # a new request, until it is accepted
        self.deadline: float | None = None  # of a new request, on the monotonic clock
        self.describe = False  # a resumed one, until its record has come
        self.positions: dict[int, int] = {}  # what a resuming client has, by output
        self.least_grace = 0.0  # seconds that the request goes on when the client goes away
        self.cancelled = False  # the client asked for it; the executor may not know yet
        self.accepted: api.Accepted | None = None
        self.error: RequestError | None = None
        self._decoder = decoder
        self._most_pending = most_pending
        self._events: list[api.GenerateResponse] = []
        self._wake = asyncio.Event()
        self._writing_since: float | None = time.monotonic()  # None: the handler waits for us

    def begin(self, message: api.GenerateRequest) -> None:
        """The client's message is known: makes the outputs."""
        self.message = message
        stopping = message.stopping
        for index in range(message.n if message.HasField("n") else 1):
            text = TextStream(self._decoder, stopping.stop, stopping.min_tokens)
            self.outputs.append(Output(index, text, self.positions.get(index, 0)))

    @property
    def finished(self) -> bool:
        return bool(self.outputs) and all(output.finished for output in self.outputs)

    @property
    def detach_grace(self) -> float:
        """Seconds that the request goes on when the client goes away by itself."""
        asked = self.message.response.detach_grace
        return max(self.least_grace, asked.seconds + asked.nanos / 1e9)

    # --- from the executor ---

    def accept(self, prompt_tokens: int, cached_tokens: int) -> None:
        if self.accepted is None:
            self.accepted = api.Accepted(
                request_id=self.request_id, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens
            )
            self._events.append(api.GenerateResponse(accepted=self.accepted))
        self.submit = None
        self._wake.set()

    def take_record(self, record: ex.Record) -> None:
        """The answer to `describe`: all tokens follow, from the first."""
        if self.describe:
            self.describe = False
            self.begin(api.GenerateRequest.FromString(record.request))
            self.accept(record.prompt_tokens, 0)

    def notice(self, kind: api.NoticeKind, message: str) -> None:
        event = api.GenerateResponse(notice=api.Notice(kind=kind, message=message))
        if event not in self._events:
            self._events.append(event)
        self._wake.set()

    def tokens(self, index: int, offset: int, ids: list[int], logprobs: list[float]) -> bool:
        """Takes a run. Whether a stop string has just ended the output, at `received`."""
        output = self.outputs[index]
        skip = output.received - offset
        if self.error is not None or output.stopped or output.finished:
            return False
        if skip < 0:
            log.error("gap", request=self.request_id, output=index, expected=output.received, offset=offset)
            self.fail(unavailable("the stream lost its place; Resume at the number of tokens received"))
            return False
        for number in range(skip, len(ids)):
            text = output.text.feed(ids[number])
            output.received += 1
            if output.received > output.wanted_from:
                output.ids.append(ids[number])
                output.pending_text += text
                if logprobs:
                    output.logprobs.append(logprobs[number])
            if output.stopped:
                break
        if len(output.ids) > self._most_pending and self._writes_for() > SLOW_SECONDS:
            message = "the client reads too slowly; Resume at the number of tokens received"
            self.fail(RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER", message))
        self._wake.set()
        return output.stopped

    def end(self, ended: ex.Ended) -> None:
        output = self.outputs[ended.index]
        if output.ended is None:
            output.ended = ended
        self._wake.set()

    def fail(self, error: RequestError) -> None:
        self.error = self.error or error
        self._wake.set()

    # --- to the client ---

    async def drain(self) -> list[api.GenerateResponse]:
        """Waits until there is something, then takes all of it: one message for each output."""
        self._writing_since = None
        try:
            while True:
                self._wake.clear()
                responses = self._events
                self._events = []
                for output in self.outputs:
                    responses.extend(self._take(output))
                if responses or self.error is not None:
                    return responses
                await self._wake.wait()
        finally:
            self._writing_since = time.monotonic()

    def _writes_for(self) -> float:
        """Seconds since the handler took what it is writing."""
        return 0.0 if self._writing_since is None else time.monotonic() - self._writing_since

    def _take(self, output: Output) -> Iterator[api.GenerateResponse]:
        if output.finished:
            return
        ended = output.ended
        # After a stop string too: usage and the stored end are the executor's.
        over = ended is not None and (output.stopped or output.received >= ended.length)
        if over:
            output.pending_text += self._rest(output)
        if output.ids or output.pending_text:
            yield api.GenerateResponse(
                tokens=api.Tokens(
                    index=output.index,
                    offset=output.received - len(output.ids),
                    token_ids=output.ids,
                    text=output.pending_text,
                    logprobs=output.logprobs,
                )
            )
            output.ids, output.logprobs, output.pending_text = [], [], ""
        if over and ended is not None:
            output.finished = True
            yield api.GenerateResponse(finished=self._finished(output, ended))

    @staticmethod
    def _rest(output: Output) -> str:
        """The held-back text of an output that is over.

        It belongs to the last token, with which it comes: a client that has the token has the text.
        An output that was cancelled ends with its last token's own text, for that token may be
        written long since.
        """
        if output.ended is None or output.ended.reason == ex.END_REASON_CANCELLED:
            return ""
        rest = output.text.finish()  # may find a stop string
        return rest if output.received > output.wanted_from else ""

    def _finished(self, output: Output, ended: ex.Ended) -> api.Finished:
        return api.Finished(
            index=output.index,
            reason=api.FINISH_REASON_STOP if output.stopped else _REASONS[ended.reason],
            usage=api.Usage(
                prompt_tokens=self.accepted.prompt_tokens if self.accepted is not None else 0,
                completion_tokens=output.received,
                cached_tokens=ended.cached_tokens,
            ),
        )
