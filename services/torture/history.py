"""What was heard of a request, held against its reference. Pure, and it hides nothing.

Every event is (request, index, offset, tokens, text, logprobs). Each offset of an output must come once
and in order, and be the reference's; after the end nothing comes; a cancelled output is a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from pagehold.v1 import inference_pb2 as api


class Kind(Enum):
    """How a history can be wrong."""

    WRONG = "wrong"  # another token, text, log-probability, reason or usage
    LOST = "lost"  # an offset that never came, or an end that never came
    REPEATED = "repeated"  # an offset that came twice, or something after the end
    STATUS = "status"  # an error that a client would see
    LEAK = "leak"  # something is left over, or contradicts itself


@dataclass(frozen=True, slots=True)
class Deviation:
    """Something that must not be."""

    kind: Kind
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.where}: {self.what}"


@dataclass(slots=True)
class Output:
    """One output, as heard so far or as it must be."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    reason: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class History:
    """One client's view of one request, across all its streams."""

    def __init__(self, request_id: str, outputs: int, reference: Sequence[Output] | None = None) -> None:
        """reference: None while the reference itself is measured."""
        self.request_id = request_id
        self.outputs = [Output() for _ in range(outputs)]
        self.deviations: list[Deviation] = []
        self.may_be_cut = False  # a cancel was sent: it may end early
        self.accepted = 0
        self._reference = reference
        self._ended_here: set[int] = set()  # outputs whose end came on the present stream

    @property
    def is_over(self) -> bool:
        return all(output.reason for output in self.outputs)

    @property
    def offsets(self) -> dict[int, int]:
        """The next token wanted, by output."""
        return {index: len(output.tokens) for index, output in enumerate(self.outputs)}

    @property
    def tokens(self) -> int:
        """Of all outputs."""
        return sum(len(output.tokens) for output in self.outputs)

    def begin_stream(self) -> None:
        """A new stream: `accepted` comes again, and every end that came before."""
        self._ended_here.clear()

    def take(self, response: api.GenerateResponse) -> None:
        """The next event of the present stream."""
        match response.WhichOneof("event"):
            case "accepted":
                self.accepted += 1
                if response.accepted.request_id != self.request_id:
                    self._report(Kind.WRONG, f"accepted as {response.accepted.request_id}")
            case "tokens":
                self._take_tokens(response.tokens)
            case "finished":
                self._take_end(response.finished)
            case None:
                self._report(Kind.WRONG, "a message without an event")

    def end_stream(self) -> None:
        """The stream ended with OK."""
        for index, output in enumerate(self.outputs):
            if not output.reason or index not in self._ended_here:
                self._report(Kind.LOST, f"output {index}: the stream ended without its end")

    def _take_tokens(self, message: api.Tokens) -> None:
        index, output = message.index, self.outputs[message.index]
        known = len(output.tokens)
        if output.reason:
            self._report(Kind.REPEATED, f"output {index}: tokens at offset {message.offset} after the end")
        elif message.offset != known:
            kind = Kind.LOST if message.offset > known else Kind.REPEATED
            self._report(kind, f"output {index}: offset {message.offset} where {known} was due")
        else:
            output.tokens.extend(message.token_ids)
            output.logprobs.extend(message.logprobs)
            output.text += message.text
            self._compare(index, known)

    def _take_end(self, message: api.Finished) -> None:
        index, output = message.index, self.outputs[message.index]
        usage = message.usage
        if index in self._ended_here:
            self._report(Kind.REPEATED, f"output {index}: ended twice on one stream")
        self._ended_here.add(index)
        heard = (message.reason, usage.prompt_tokens, usage.completion_tokens)
        before = (output.reason, output.prompt_tokens, output.completion_tokens)
        if output.reason and heard != before:
            self._report(Kind.WRONG, f"output {index}: ended as {before}, then as {heard}")
        output.reason, output.prompt_tokens, output.completion_tokens = heard
        if len(output.tokens) != usage.completion_tokens:
            said = f"{len(output.tokens)} tokens came, usage says {usage.completion_tokens}"
            self._report(Kind.LOST, f"output {index}: {said}")
        if self._reference is not None and not self._was_cut(output):
            self._compare_end(index, output, self._reference[index])

    def _was_cut(self, output: Output) -> bool:
        return self.may_be_cut and output.reason == api.FINISH_REASON_CANCELLED

    def _compare(self, index: int, first: int) -> None:
        """What came last, from token `first` on, against the reference."""
        if self._reference is None:
            return
        output, wanted = self.outputs[index], self._reference[index]
        end = len(output.tokens)
        if output.tokens[first:] != wanted.tokens[first:end]:
            at = next(
                (at for at, pair in enumerate(zip(output.tokens, wanted.tokens, strict=False)) if pair[0] != pair[1]),
                len(wanted.tokens),
            )
            due = wanted.tokens[at : at + 1] or "the end"
            self._report(Kind.WRONG, f"output {index}: token {output.tokens[at]} at offset {at} where {due} was due")
        elif output.logprobs[first:] != wanted.logprobs[first : len(output.logprobs)]:
            self._report(Kind.WRONG, f"output {index}: other log-probabilities from offset {first} on")
        # A cut may leave half a character at the end.
        text = output.text.rstrip("\N{REPLACEMENT CHARACTER}") if self.may_be_cut else output.text
        if not wanted.text.startswith(text):
            self._report(Kind.WRONG, f"output {index}: text {text[-40:]!r} at offset {first} is not the reference's")

    def _compare_end(self, index: int, output: Output, wanted: Output) -> None:
        for name in ("reason", "completion_tokens", "prompt_tokens", "text"):
            if (heard := getattr(output, name)) != (due := getattr(wanted, name)):
                self._report(Kind.WRONG, f"output {index}: {name} {heard!r} where {due!r} was due")
        if len(output.tokens) < len(wanted.tokens):
            said = f"{len(output.tokens)} tokens where {len(wanted.tokens)} were due"
            self._report(Kind.LOST, f"output {index}: {said}")
        if len(output.logprobs) != len(wanted.logprobs):
            self._report(Kind.WRONG, f"output {index}: {len(output.logprobs)} log-probabilities")

    def _report(self, kind: Kind, what: str) -> None:
        self.deviations.append(Deviation(kind, self.request_id, what))
