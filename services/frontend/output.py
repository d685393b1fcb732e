"""One output inside the frontend: the tokens and the text of it that are not written yet.

0 ........ wanted_from ........ received - len(ids) ........ received
the client | written by this     | waits to be written,       | nothing yet
has it     | stream              | or is held for a ranking   |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.v1 import inference_pb2 as api
from services.frontend.textstream import TextStream

_REASONS: Final = {
    ex.END_REASON_STOP: api.FINISH_REASON_STOP,
    ex.END_REASON_LENGTH: api.FINISH_REASON_LENGTH,
    ex.END_REASON_CANCELLED: api.FINISH_REASON_CANCELLED,
}


@dataclass(slots=True)
class Output:
    """As far as this stream has come with it."""

    index: int  # as the executor counts
    text: TextStream
    wanted_from: int = 0  # the client has what lies below
    received: int = 0  # tokens taken from the executor: the next offset expected
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of `ids`, or none
    texts: list[str] = field(default_factory=list)  # of `ids`, and what a stop string might have begun
    ended: ex.Ended | None = None
    finished: bool = False  # `finished` has been handed to the writer
    shown_as: int = field(init=False)  # the index that the client sees

    def __post_init__(self) -> None:
        self.shown_as = self.index

    @property
    def stopped(self) -> bool:
        """A stop string ended it; the executor may not know yet."""
        return self.text.stopped

    @property
    def over(self) -> bool:
        """All its tokens are here. After a stop string too the end is waited for: it is the executor's to tell."""
        return self.ended is not None and (self.stopped or self.received >= self.ended.length)

    def feed(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Its next tokens, up to a stop string that shows up in their text."""
        for number, token in enumerate(ids):
            text = self.text.feed(token)
            self.received += 1
            if self.received > self.wanted_from:
                self.ids.append(token)
                self.texts.append(text)
                if logprobs:
                    self.logprobs.append(logprobs[number])
            if self.stopped:
                return

    def show_as(self, index: int, wanted_from: int, logprobs: bool) -> None:
        """The client knows this output as `index` and has its tokens below `wanted_from`. Nothing is written yet."""
        self.shown_as, self.wanted_from = index, wanted_from
        del self.ids[:wanted_from], self.texts[:wanted_from]
        self.logprobs = self.logprobs[wanted_from:] if logprobs else []

    def take(self, prompt_tokens: int) -> Iterator[api.GenerateResponse]:
        """Everything that can be written now, at most once."""
        if self.finished:
            return
        over = self.over
        if over and (rest := self._rest()):
            self.texts.append(rest)
        if self.ids or any(self.texts):
            yield api.GenerateResponse(
                tokens=api.Tokens(
                    index=self.shown_as,
                    offset=self.received - len(self.ids),
                    token_ids=self.ids,
                    text="".join(self.texts),
                    logprobs=self.logprobs,
                )
            )
            self.ids, self.logprobs, self.texts = [], [], []
        if over and self.ended is not None:
            self.finished = True
            yield api.GenerateResponse(finished=self._finished(self.ended, prompt_tokens))

    def _rest(self) -> str:
        """The held-back text of an output that is over.

        It belongs to the last token, with which it comes: a client that has the token has the text.
        An output that was cancelled ends with its last token's own text, for that token may be
        written long since.
        """
        if self.ended is None or self.ended.reason == ex.END_REASON_CANCELLED:
            return ""
        rest = self.text.finish()  # may find a stop string
        return rest if self.received > self.wanted_from else ""

    def _finished(self, ended: ex.Ended, prompt_tokens: int) -> api.Finished:
        return api.Finished(
            index=self.shown_as,
            reason=api.FINISH_REASON_STOP if self.stopped else _REASONS[ended.reason],
            usage=api.Usage(
                prompt_tokens=prompt_tokens, completion_tokens=self.received, cached_tokens=ended.cached_tokens
            ),
        )
