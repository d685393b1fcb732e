"""One client's stream inside the frontend: expected offsets, text, and what waits to be written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import grpc

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.v1 import inference_pb2 as api
from services.frontend.errors import RequestError
from services.frontend.textstream import TextStream

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
    finished: bool = False  # `finished` has been written

    @property
    def stopped(self) -> bool:
        return self.text.stopped


class ClientStream:
    """Fed by the executor link, drained by the handler; both on the event loop."""

    def __init__(
        self, stream_id: int, request_id: str, decode: Callable[[Sequence[int]], str], most_pending: int
    ) -> None:
        self.stream_id = stream_id
        self.request_id = request_id
        self.message = api.GenerateRequest()
        self.outputs: list[Output] = []
        self.submit: ex.Submit | None = None  # a new request, until it is accepted
        self.describe = False  # a resumed one, until its record has come
        self.positions: dict[int, int] = {}  # what a resuming client has, by output
        self.accepted: api.Accepted | None = None
        self.error: RequestError | None = None
        self.prompt_tokens = 0
        self._decode = decode
        self._most_pending = most_pending
        self._events: list[api.GenerateResponse] = []
        self._wake = asyncio.Event()

    def begin(self, message: api.GenerateRequest) -> None:
        """The client's message is known: makes the outputs."""
        self.message = message
        stopping = message.stopping
        for index in range(message.n if message.HasField("n") else 1):
            text = TextStream(self._decode, stopping.stop, stopping.min_tokens)
            self.outputs.append(Output(index, text, self.positions.get(index, 0)))

    @property
    def is_accepted(self) -> bool:
        return self.accepted is not None

    @property
    def done(self) -> bool:
        return self.error is not None or (bool(self.outputs) and all(output.finished for output in self.outputs))

    # --- from the executor ---

    def accept(self, prompt_tokens: int, cached_tokens: int) -> None:
        if self.accepted is None:
            self.prompt_tokens = prompt_tokens
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
        self._events.append(api.GenerateResponse(notice=api.Notice(kind=kind, message=message)))
        self._wake.set()

    def tokens(self, index: int, offset: int, ids: list[int], logprobs: list[float]) -> int | None:
        """Takes a run. Returns the output's length when a stop string has just ended it."""
        output = self.outputs[index]
        skip = output.received - offset
        if skip < 0:
            raise AssertionError(f"gap: token {offset} after {output.received}")
        if output.stopped or output.finished:
            return None
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
        if len(output.ids) > self._most_pending:
            message = "the client reads too slowly; Resume at the number of tokens received"
            self.fail(RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER", message))
        self._wake.set()
        return output.received if output.stopped else None

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
        while True:
            self._wake.clear()
            responses = self._events
            self._events = []
            for output in self.outputs if self.is_accepted else ():
                responses.extend(self._take(output))
            if responses or self.error is not None:
                return responses
            await self._wake.wait()

    def _take(self, output: Output) -> Iterator[api.GenerateResponse]:
        if output.finished:
            return
        ended = output.ended
        over = output.stopped or (ended is not None and output.received >= ended.length)
        if over and not output.stopped:
            output.pending_text += output.text.finish()  # may find a stop string in what was held back
        if output.ids or output.pending_text:
            offset = output.received - len(output.ids)
            yield api.GenerateResponse(
                tokens=api.Tokens(
                    index=output.index,
                    offset=offset,
                    token_ids=output.ids,
                    text=output.pending_text,
                    logprobs=output.logprobs,
                )
            )
            output.ids, output.logprobs, output.pending_text = [], [], ""
        if over:
            output.finished = True
            reason = api.FINISH_REASON_STOP if output.stopped or ended is None else _REASONS[ended.reason]
            yield api.GenerateResponse(
                finished=api.Finished(
                    index=output.index,
                    reason=reason,
                    usage=api.Usage(
                        prompt_tokens=self.prompt_tokens,
                        completion_tokens=output.received,
                        cached_tokens=ended.cached_tokens if ended is not None else 0,
                    ),
                )
            )
