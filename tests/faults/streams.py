"""Streams as a checker sees them: every token has one offset, each offset comes once and in order."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import NamedTuple

import grpc

from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc

RESUME_SECONDS = 30.0


class Answer(NamedTuple):
    """What must not depend on any fault: of the first output, and of the others."""

    tokens: list[int]
    text: str
    reason: int
    completion_tokens: int
    others: tuple[Answer, ...] = ()


@dataclass
class HeardOutput:
    """What one client heard of one output."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: int = 0
    usage: api.Usage = field(default_factory=api.Usage)
    logprobs: list[float] = field(default_factory=list)

    @property
    def answer(self) -> Answer:
        return Answer(self.tokens, self.text, self.reason, self.usage.completion_tokens)


@dataclass
class Heard:
    """What one client heard of one request."""

    outputs: list[HeardOutput] = field(default_factory=lambda: [HeardOutput()])
    accepted: int = 0
    notices: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, message: api.GenerateRequest) -> Heard:
        return cls([HeardOutput() for _ in range(message.n or 1)])

    def take(self, response: api.GenerateResponse) -> None:
        match response.WhichOneof("event"):
            case "accepted":
                self.accepted += 1
            case "tokens":
                message = response.tokens
                output = self.outputs[message.index]
                assert message.offset == len(output.tokens), f"offset {message.offset} after {len(output.tokens)}"
                assert not output.reason, "tokens after the end"
                output.tokens.extend(message.token_ids)
                output.logprobs.extend(message.logprobs)
                output.text += message.text
            case "notice":
                self.notices.append(response.notice.kind)
            case "finished":
                output = self.outputs[response.finished.index]
                output.reason = response.finished.reason
                output.usage.CopyFrom(response.finished.usage)

    @property
    def tokens(self) -> list[int]:
        """Of the first output."""
        return self.outputs[0].tokens

    @property
    def least(self) -> int:
        """Tokens that every output has."""
        return min(len(output.tokens) for output in self.outputs)

    @property
    def over(self) -> bool:
        return all(output.reason for output in self.outputs)

    @property
    def answer(self) -> Answer:
        first, *others = (output.answer for output in self.outputs)
        return first._replace(others=tuple(others))


def mixed(count: int = 8, tokens: int = 96) -> list[api.GenerateRequest]:
    """Greedy and seeded ones in turn; the second has four outputs, so that forks are among their rows."""
    messages = [request(number, tokens) for number in range(count)]
    messages[1].n = 4
    return messages


def request(
    number: int, tokens: int = 96, text: str | None = None, seeded: bool | None = None, **options: object
) -> api.GenerateRequest:
    """Request `number` of a set in which greedy and seeded ones alternate."""
    message = api.GenerateRequest(request_id=f"request-{number}", **options)  # type: ignore[arg-type]
    message.text = text or f"{_OPENINGS[number % len(_OPENINGS)]} (variation {number})"
    if seeded if seeded is not None else number % 2:
        message.sampling.temperature, message.sampling.seed = 0.9, 1000 + number
    else:
        message.sampling.temperature = 0.0
        if text is None:  # or it runs in circles, and drafts make it many times as fast as the seeded ones
            message.sampling.repetition_penalty = 1.3
    message.stopping.max_tokens = tokens
    message.stopping.ignore_eos = True
    return message


def repeating(number: int, tokens: int = 96, **options: object) -> api.GenerateRequest:
    """A greedy request whose answer says again what its prompt says: most drafts are right."""
    line = f"The keeper of lighthouse {number} lit the lamp, wrote down the weather and went to bed.\n"
    return request(number, tokens, line * 6, seeded=False, **options)


_OPENINGS = (
    "The history of the lighthouse begins with",
    "To bake a good loaf of bread you need",
    "In the year 2051 the first ship to",
    "A binary search tree is a data structure that",
    "The children walked into the forest and",
    "Photosynthesis is the process by which",
    "Dear colleagues, I am writing to",
    "Once the rain had stopped, the old man",
)


class Load:
    """Streams under way, and what each has heard so far."""

    def __init__(
        self, address: str, messages: list[api.GenerateRequest], resume: bool = False, seconds: float | None = None
    ) -> None:
        """resume: across frontends that come and go. seconds: the requests' deadline."""
        self.heard = [Heard.of(message) for message in messages]
        # Those that are ranked are silent until they end.
        self._watched = [
            heard for heard, message in zip(self.heard, messages, strict=True) if message.best_of <= (message.n or 1)
        ]
        self._tasks = [
            asyncio.create_task(generate(address, message, resume, heard, seconds))
            for message, heard in zip(messages, self.heard, strict=True)
        ]

    @property
    def any_over(self) -> bool:
        return any(task.done() for task in self._tasks)

    async def reach(self, tokens: int) -> None:
        """Waits until every output has this many more tokens than now. None may end before: nothing would be shown."""
        wanted = [heard.least + tokens for heard in self._watched]
        while any(heard.least < want for heard, want in zip(self._watched, wanted, strict=True)):
            await asyncio.sleep(0.005)
            assert not self.any_over, "a stream ended before the fault"

    async def answers(self) -> list[Answer]:
        await asyncio.gather(*self._tasks)
        return [heard.answer for heard in self.heard]


async def generate(
    address: str,
    message: api.GenerateRequest,
    resume: bool = False,
    heard: Heard | None = None,
    seconds: float | None = None,
) -> Heard:
    """One request to its end; with `resume`, across frontends that come and go."""
    heard = heard or Heard.of(message)
    loop = asyncio.get_running_loop()
    give_up = 0.0
    while True:
        try:
            async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
                stub = api_grpc.InferenceServiceStub(channel)
                if heard.accepted:
                    again = api.ResumeRequest(request_id=message.request_id)
                    for index, output in enumerate(heard.outputs):
                        again.positions.add(index=index, offset=len(output.tokens))
                    stream = stub.Resume(again)
                else:
                    stream = stub.Generate(message, timeout=seconds)
                async for response in stream:
                    heard.take(response)
                    give_up = 0.0
                assert heard.over, "the stream ended without `finished`"
                return heard
        except grpc.aio.AioRpcError as error:
            if not resume or error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            give_up = give_up or loop.time() + RESUME_SECONDS
            if loop.time() > give_up:
                raise
            await asyncio.sleep(0.05)


_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 10_000),  # how long one attempt may take: 64 clients come at once
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
]


async def undisturbed(address: str, messages: list[api.GenerateRequest]) -> list[Answer]:
    """The reference: the same bodies under other ids, with nothing killed."""
    return await Load(address, renamed(messages, "reference")).answers()


def renamed(messages: list[api.GenerateRequest], prefix: str) -> list[api.GenerateRequest]:
    """The same bodies under other ids: requests of their own, with the same tokens."""
    copies = []
    for message in messages:
        copy = api.GenerateRequest()
        copy.CopyFrom(message)
        copy.request_id = f"{prefix}-{message.request_id}"
        copies.append(copy)
    return copies


def prefilled(address: str) -> int:
    """Prompt positions computed since the executor started."""
    with grpc.insecure_channel(address) as channel:
        return int(api_grpc.ModelServiceStub(channel).GetLoad(api.GetLoadRequest()).prefill_tokens)


async def drafts_accepted(address: str) -> None:
    """Waits until guesses at tokens were right since the executor started."""
    async with grpc.aio.insecure_channel(address) as channel:
        models = api_grpc.ModelServiceStub(channel)
        while True:
            try:
                load = await models.GetLoad(api.GetLoadRequest())
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            else:
                if load.accepted_tokens:
                    return
            await asyncio.sleep(0.01)
