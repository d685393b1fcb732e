"""A client's stream: the same tokens and text however they come, nothing twice, and nothing without a bound."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.v1 import inference_pb2 as api
from services.frontend import clientstream
from services.frontend.clientstream import ClientStream
from services.frontend.tokenizer import ModelTokenizer
from tests.unit.frontend.world import byte_level, described

TOKENIZER = ModelTokenizer(described(byte_level()))
PROMPT = 7


@dataclass
class Client:
    """What a client has after some messages."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finished: api.Finished | None = None

    def take(self, responses: Sequence[api.GenerateResponse]) -> None:
        for response in responses:
            match response.WhichOneof("event"):
                case "tokens":
                    tokens = response.tokens
                    assert self.finished is None
                    assert tokens.offset == len(self.ids)
                    assert len(tokens.logprobs) in (0, len(tokens.token_ids))
                    self.ids += tokens.token_ids
                    self.logprobs += tokens.logprobs
                    self.text += tokens.text
                case "finished":
                    assert self.finished is None
                    self.finished = response.finished


def new(message: api.GenerateRequest, most_pending: int = 4096) -> ClientStream:
    stream = ClientStream(1, "one", TOKENIZER, most_pending)
    stream.begin(message)
    stream.accept(PROMPT, 0)
    return stream


def resumed(message: api.GenerateRequest, offset: int) -> ClientStream:
    stream = ClientStream(2, "one", TOKENIZER, 4096)
    stream.describe, stream.positions = True, {0: offset}
    stream.take_record(ex.Record(request=message.SerializeToString(), prompt_tokens=PROMPT))
    return stream


def ended(length: int, reason: ex.EndReason = ex.END_REASON_LENGTH, index: int = 0) -> ex.Ended:
    return ex.Ended(index=index, reason=reason, length=length, cached_tokens=3)


async def taken(stream: ClientStream) -> list[api.GenerateResponse]:
    """All that can be written now."""
    try:
        async with asyncio.timeout(0):
            return await stream.drain()
    except TimeoutError:
        return []


async def play(stream: ClientStream, ids: list[int], splits: list[int], end: ex.Ended) -> list[Client]:
    """Feeds the output in runs; the client's state after each write. The end comes with the last run."""
    client = Client()
    if stream.positions:
        client.ids = ids[: stream.positions[0]]
    states = []
    borders = sorted({0, *(split % (len(ids) + 1) for split in splits), len(ids)})
    for start, stop in pairwise(borders):
        if stop == len(ids):
            stream.end(end)
        stream.tokens(0, start, ids[start:stop], [float(token) for token in ids[start:stop]])
        client.take(await taken(stream))
        states.append(Client(list(client.ids), list(client.logprobs), client.text, client.finished))
        if stream.finished:
            break
        if stream.outputs[0].stopped:
            stream.end(ended(stream.outputs[0].received, ex.END_REASON_STOP))
            client.take(await taken(stream))
            states.append(Client(list(client.ids), list(client.logprobs), client.text, client.finished))
            break
    return states


outputs = st.lists(st.integers(0, byte_level().get_vocab_size() - 1), min_size=1, max_size=30) | st.text(
    alphabet="ab €😀", min_size=1, max_size=30
).map(TOKENIZER.encode)
splits = st.lists(st.integers(0, 1000), max_size=8)
stops = st.lists(st.text(alphabet="ab €\ufffd", min_size=1, max_size=4), max_size=2)


@settings(deadline=None, max_examples=200)
@given(outputs, stops, splits, splits, st.integers(0, 100))
def test_a_resumed_stream_gives_exactly_the_rest(
    ids: list[int], stop: list[str], before: list[int], after: list[int], break_at: int
) -> None:
    message = api.GenerateRequest(text="x")
    message.stopping.stop.extend(stop)

    async def check() -> None:
        whole = (await play(new(message), ids, [], ended(len(ids))))[-1]
        assert whole.finished is not None
        # The first stream breaks after one of its writes; the second resumes at what the client has.
        states = await play(new(message), ids, before, ended(len(ids)))
        assert states[-1] == whole
        broken = states[break_at % len(states)]
        rest = (await play(resumed(message, len(broken.ids)), ids, after, ended(len(ids))))[-1]
        assert rest.ids == whole.ids
        assert broken.text + rest.text == whole.text
        assert broken.logprobs + rest.logprobs == whole.logprobs
        assert rest.finished is not None
        assert rest.finished.reason == whole.finished.reason
        assert rest.finished.usage.completion_tokens == whole.finished.usage.completion_tokens == len(whole.ids)

    asyncio.run(check())


@settings(deadline=None)
@given(outputs, st.integers(0, 100))
def test_a_cancelled_output_repeats_nothing_when_it_is_resumed(ids: list[int], cut: int) -> None:
    """Its end comes long after its last token was written."""
    message = api.GenerateRequest(text="x")
    cut = cut % len(ids)

    async def check() -> None:
        stream, client = new(message), Client()
        stream.tokens(0, 0, ids, [])
        client.take(await taken(stream))
        written = client.text
        stream.end(ended(len(ids), ex.END_REASON_CANCELLED))
        client.take(await taken(stream))
        assert client.text == written
        assert client.finished is not None
        assert client.finished.reason == api.FINISH_REASON_CANCELLED
        again = (await play(resumed(message, len(ids)), ids, [cut], ended(len(ids), ex.END_REASON_CANCELLED)))[-1]
        assert again.text == ""
        assert again.finished == client.finished

    asyncio.run(check())


async def test_runs_that_overlap_count_once() -> None:
    stream, client = new(api.GenerateRequest(text="x")), Client()
    ids = TOKENIZER.encode("abcdefgh")
    for start, stop in ((0, 4), (0, 4), (2, 6), (5, len(ids))):
        stream.tokens(0, start, ids[start:stop], [])
        client.take(await taken(stream))
    assert client.ids == ids
    assert client.text == "abcdefgh"


async def test_a_gap_is_an_error_that_says_how_to_go_on() -> None:
    stream = new(api.GenerateRequest(text="x"))
    stream.tokens(0, 2, [5], [])
    assert stream.error is not None
    assert stream.error.code is grpc.StatusCode.UNAVAILABLE
    assert "Resume" in stream.error.message
    assert [one.WhichOneof("event") for one in await stream.drain()] == ["accepted"]


@pytest.mark.parametrize("reason", [ex.END_REASON_LENGTH, ex.END_REASON_CANCELLED])
async def test_a_stop_string_beats_the_terminal_word(reason: ex.EndReason) -> None:
    message = api.GenerateRequest(text="x")
    message.stopping.stop.append("c")
    stream, client = new(message), Client()
    ids = TOKENIZER.encode("abcde")
    assert stream.tokens(0, 0, ids, [])
    assert not stream.tokens(0, len(ids), [9], []), "found once"
    client.take(await taken(stream))
    assert client.finished is None, "usage is the executor's to tell"
    stream.end(ended(len(ids) + 1, reason))
    client.take(await taken(stream))
    assert client.text == "ab"
    assert client.ids == TOKENIZER.encode("abc")
    assert client.finished is not None
    assert client.finished.reason == api.FINISH_REASON_STOP
    assert client.finished.usage == api.Usage(prompt_tokens=PROMPT, completion_tokens=len(client.ids), cached_tokens=3)


async def test_the_last_token_comes_with_the_text_that_was_held_back() -> None:
    """Else a client that lost its stream between the two would lack the text, or get it twice."""
    message = api.GenerateRequest(text="x")
    message.stopping.stop.append("bb")
    stream = new(message)
    ids = TOKENIZER.encode("cb")
    stream.end(ended(len(ids)))
    stream.tokens(0, 0, ids, [])
    events = [one for one in await stream.drain() if one.WhichOneof("event") != "accepted"]
    assert [one.WhichOneof("event") for one in events] == ["tokens", "finished"]
    assert events[0].tokens.text == "cb"


async def test_two_outputs_end_each_on_its_own() -> None:
    stream = new(api.GenerateRequest(text="x", n=2))
    ids = TOKENIZER.encode("ab")
    stream.tokens(1, 0, ids, [])
    stream.end(ended(len(ids), index=1))
    kinds = [(one.WhichOneof("event"), one.finished.index) for one in await stream.drain()]
    assert ("finished", 1) in kinds and ("finished", 0) not in kinds
    assert not stream.finished
    stream.end(ended(0, index=0))
    assert [one.finished.index for one in await stream.drain()] == [0]
    assert stream.finished


async def test_nothing_is_written_before_the_request_is_accepted() -> None:
    stream = ClientStream(1, "one", TOKENIZER, 4096)
    stream.begin(api.GenerateRequest(text="x"))
    assert await taken(stream) == []
    stream.accept(PROMPT, 0)
    stream.tokens(0, 0, [9], [])
    assert [one.WhichOneof("event") for one in await stream.drain()] == ["accepted", "tokens"]


async def test_a_slow_reader_is_dropped_and_nothing_piles_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clientstream, "SLOW_SECONDS", 0.05)
    stream = new(api.GenerateRequest(text="x"), most_pending=64)
    await stream.drain()  # and from now on the handler is stuck in its write
    stream.tokens(0, 0, [9] * 1000, [])
    assert stream.error is None, "a backlog alone is not the client's fault"
    await asyncio.sleep(0.1)
    stream.tokens(0, 1000, [9], [])
    assert stream.error is not None
    assert stream.error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "Resume" in stream.error.message
    for number in range(1001, 5000):
        stream.tokens(0, number, [9], [])
    assert len(stream.outputs[0].ids) == 1001


async def test_a_handler_that_waits_is_never_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clientstream, "SLOW_SECONDS", 0.0)
    stream = new(api.GenerateRequest(text="x"), most_pending=64)
    await stream.drain()
    waiting = asyncio.create_task(stream.drain())
    await asyncio.sleep(0.01)
    stream.tokens(0, 0, [9] * 1000, [])
    stream.tokens(0, 1000, [9] * 1000, [])
    assert stream.error is None
    assert len((await waiting)[0].tokens.token_ids) == 2000


async def test_notices_do_not_pile_up() -> None:
    stream = new(api.GenerateRequest(text="x"))
    for _ in range(100):
        stream.notice(api.NOTICE_KIND_RECOVERED, "again")
    assert [one.WhichOneof("event") for one in await stream.drain()] == ["accepted", "notice"]


def test_grace() -> None:
    message = api.GenerateRequest(text="x")
    assert new(message).detach_grace == 0
    message.response.detach_grace.FromMilliseconds(1500)
    assert new(message).detach_grace == 1.5
    again = resumed(message, 0)
    again.least_grace = 30.0
    assert again.detach_grace == 30
    message.response.detach_grace.FromSeconds(300)
    longer = resumed(message, 0)
    longer.least_grace = 30.0
    assert longer.detach_grace == 300
