"""One client's stream inside the frontend: expected offsets, text, and what waits to be written.

With `best_of` above `n` nothing is written before every output is over: then the best are shown,
renumbered, as if they had come only now. What is held until then is bounded by the request itself.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

import grpc
import structlog

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.v1 import inference_pb2 as api
from services.frontend.errors import RequestError, from_failure, unavailable
from services.frontend.output import Output
from services.frontend.ranking import best, outputs_asked, outputs_sampled
from services.frontend.textstream import Decoder, TextStream

log = structlog.get_logger()

# A client is slow when one write to it takes this long while tokens pile up behind. A backlog
# alone is none of its fault: a stream that is resumed gets all its tokens at once.
SLOW_SECONDS: Final = 2.0


class ClientStream:
    """Fed by the executor link, drained by the handler; both on the event loop."""

    def __init__(self, stream_id: int, request_id: str, decoder: Decoder, most_pending: int) -> None:
        self.stream_id = stream_id
        self.request_id = request_id
        self.message = api.GenerateRequest()
        self.outputs: list[Output] = []  # all that are sampled, as the executor counts them
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
        self._shown: list[Output] = []  # those that the client sees: none while they are held for a ranking
        self._events: list[api.GenerateResponse] = []
        self._wake = asyncio.Event()
        self._writing_since: float | None = time.monotonic()  # None: the handler waits for us

    def begin(self, message: api.GenerateRequest) -> None:
        """The client's message is known: makes the outputs."""
        self.message = message
        stopping = message.stopping
        for index in range(outputs_sampled(message)):
            text = TextStream(self._decoder, stopping.stop, stopping.min_tokens)
            self.outputs.append(Output(index, text))
        if not self.is_ranked:
            for output in self.outputs:
                output.wanted_from = self.positions.get(output.index, 0)
            self._shown = self.outputs
        elif any(index >= outputs_asked(message) for index in self.positions):
            self.fail(from_failure(ex.Failed(failure=ex.FAILURE_OUT_OF_RANGE)))

    @property
    def is_ranked(self) -> bool:
        """More outputs are sampled than the client gets; its positions name ranked ones."""
        return outputs_sampled(self.message) > outputs_asked(self.message)

    @property
    def wants_logprobs(self) -> bool:
        return self.message.response.logprobs or self.is_ranked

    @property
    def finished(self) -> bool:
        return bool(self._shown) and all(output.finished for output in self._shown)

    @property
    def waits(self) -> bool:
        """No token of it has come yet."""
        return not any(output.received for output in self.outputs)

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
        output.feed(ids[skip:], logprobs[skip:])
        if self._shown and len(output.ids) > self._most_pending and self._writes_for() > SLOW_SECONDS:
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
                if not self._shown and self.outputs and all(output.over for output in self.outputs):
                    self._rank()
                prompt_tokens = self.accepted.prompt_tokens if self.accepted is not None else 0
                for output in self._shown:
                    responses.extend(output.take(prompt_tokens))
                if responses or self.error is not None:
                    return responses
                await self._wake.wait()
        finally:
            self._writing_since = time.monotonic()

    def _writes_for(self) -> float:
        """Seconds since the handler took what it is writing."""
        return 0.0 if self._writing_since is None else time.monotonic() - self._writing_since

    def _rank(self) -> None:
        """Shows the best outputs. A pure function of the logs: a stream that is resumed ranks alike."""
        if any(len(output.logprobs) < len(output.ids) for output in self.outputs):
            log.error("no log-probabilities to rank by", request=self.request_id)
            self.fail(RequestError(grpc.StatusCode.INTERNAL, "INTERNAL", "the request failed"))
            return
        order = best([output.logprobs for output in self.outputs], outputs_asked(self.message))
        ranked = [self.outputs[index] for index in order]
        if any(self.positions.get(index, 0) > output.received for index, output in enumerate(ranked)):
            self.fail(from_failure(ex.Failed(failure=ex.FAILURE_OUT_OF_RANGE)))
            return
        for index, output in enumerate(ranked):
            output.show_as(index, self.positions.get(index, 0), self.message.response.logprobs)
        self._shown = ranked
