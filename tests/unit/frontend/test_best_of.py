"""A request with `best_of` above `n`: held until all outputs are over, then the best of them, renumbered."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.v1 import inference_pb2 as api
from services.frontend import clientstream
from services.frontend.clientstream import ClientStream
from tests.unit.frontend.test_clientstream import PROMPT, TOKENIZER, Client, ended, new, taken

WORDS = ("abc", "ab€", "cab", "the", "b a")
LENGTH, CANCELLED, STOP = ex.END_REASON_LENGTH, ex.END_REASON_CANCELLED, ex.END_REASON_STOP


@dataclass
class Clients:
    """What a client has of each ranked output. `offsets`: how many tokens it had of each before."""

    offsets: dict[int, int] = field(default_factory=dict)
    by_index: dict[int, Client] = field(default_factory=dict)

    def take(self, responses: list[api.GenerateResponse]) -> None:
        for response in responses:
            event = response.WhichOneof("event")
            if event in ("tokens", "finished"):
                index = getattr(response, event).index
                fresh = Client(ids=[-1] * self.offsets.get(index, 0))
                self.by_index.setdefault(index, fresh).take([response])


def request(n: int = 2, best_of: int = 3, stop: str = "", logprobs: bool = False) -> api.GenerateRequest:
    message = api.GenerateRequest(text="x", n=n, best_of=best_of)
    message.stopping.stop.extend([stop] if stop else [])
    message.response.logprobs = logprobs
    return message


def resumed(message: api.GenerateRequest, positions: dict[int, int]) -> ClientStream:
    stream = ClientStream(2, "one", TOKENIZER, 4096)
    stream.describe, stream.positions = True, positions
    stream.take_record(ex.Record(request=message.SerializeToString(), prompt_tokens=PROMPT))
    return stream


async def feed(stream: ClientStream, texts: list[str], means: list[float], reason: ex.EndReason = LENGTH) -> None:
    """All outputs to their ends, interleaved, a token at a time."""
    runs = [TOKENIZER.encode(text) for text in texts]
    for offset in range(max(map(len, runs), default=0)):
        for index, ids in enumerate(runs):
            if offset < len(ids) and not stream.outputs[index].stopped:
                stream.tokens(index, offset, [ids[offset]], [means[index]])
    for index, ids in enumerate(runs):
        stopped = stream.outputs[index].stopped
        length = stream.outputs[index].received if stopped else len(ids)
        stream.end(ended(length, STOP if stopped else reason, index))


async def test_nothing_is_shown_before_all_outputs_are_over() -> None:
    stream = new(request())
    assert [one.WhichOneof("event") for one in await taken(stream)] == ["accepted"]
    ids = TOKENIZER.encode("ab")
    for index in (0, 2):
        stream.tokens(index, 0, ids, [-1.0] * len(ids))
        stream.end(ended(len(ids), index=index))
    stream.end(ended(1, index=1))
    assert await taken(stream) == []
    assert not stream.finished
    stream.tokens(1, 0, ids[:1], [-0.5])
    kinds = [one.WhichOneof("event") for one in await taken(stream)]
    assert kinds == ["tokens", "finished", "tokens", "finished"]
    assert stream.finished


async def test_the_best_come_first_under_new_numbers() -> None:
    stream, clients = new(request(n=2, best_of=4)), Clients()
    await feed(stream, ["abc", "cab", "the", "b a"], [-2.0, -1.0, -3.0, -0.5])
    clients.take(await taken(stream))
    assert {index: one.text for index, one in clients.by_index.items()} == {0: "b a", 1: "cab"}
    for client in clients.by_index.values():
        assert client.logprobs == [], "it did not ask for them"
        assert client.finished is not None
        assert client.finished.usage.completion_tokens == len(client.ids)
    assert stream.finished


async def test_log_probabilities_for_those_who_ask() -> None:
    stream, clients = new(request(n=1, best_of=2, logprobs=True)), Clients()
    await feed(stream, ["abc", "the"], [-2.0, -1.0])
    clients.take(await taken(stream))
    assert clients.by_index[0].logprobs == [-1.0] * len(TOKENIZER.encode("the"))


async def test_only_tokens_before_a_stop_string_count() -> None:
    """Output 0 would lose by what lies behind its stop string."""
    message = request(n=1, best_of=2, stop="c")
    stream, clients = new(message), Clients()
    ids = TOKENIZER.encode("zcz")
    assert stream.tokens(0, 0, ids, [-1.0, -1.0, -50.0]), "reported, to be sent on to the executor"
    stream.tokens(1, 0, TOKENIZER.encode("ab"), [-2.0])
    stream.end(ended(2, STOP, 0))
    stream.end(ended(1, LENGTH, 1))
    clients.take(await taken(stream))
    assert (clients.by_index[0].text, len(clients.by_index[0].ids)) == ("z", 2)
    assert clients.by_index[0].finished is not None
    assert clients.by_index[0].finished.reason == api.FINISH_REASON_STOP


async def test_what_was_cancelled_is_ranked_as_far_as_it_is_there() -> None:
    stream, clients = new(request(n=3, best_of=4)), Clients()
    await feed(stream, ["abc", "", "the", "z"], [-2.0, 0.0, -1.0, -3.0], CANCELLED)
    clients.take(await taken(stream))
    assert [clients.by_index[index].text for index in range(3)] == ["the", "abc", "z"]
    reasons = {one.finished.reason for one in clients.by_index.values() if one.finished is not None}
    assert reasons == {api.FINISH_REASON_CANCELLED}


async def test_best_of_n_ranks_nothing() -> None:
    stream = new(request(n=2, best_of=2))
    assert not stream.wants_logprobs
    stream.tokens(1, 0, [9], [])
    assert [one.WhichOneof("event") for one in await taken(stream)] == ["accepted", "tokens"]


async def test_what_is_held_back_makes_no_slow_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clientstream, "SLOW_SECONDS", 0.0)
    stream = new(request(), most_pending=64)
    await stream.drain()  # and the handler is stuck in its write of `accepted`
    await asyncio.sleep(0.01)
    for index in range(3):
        stream.tokens(index, 0, [9] * 1000, [-1.0] * 1000)
        assert stream.error is None
        stream.end(ended(1000, index=index))
    tokens = [one.tokens for one in await stream.drain() if one.WhichOneof("event") == "tokens"]
    assert [(one.index, one.offset, len(one.token_ids)) for one in tokens] == [(0, 0, 1000), (1, 0, 1000)]


async def test_without_log_probabilities_there_is_no_order() -> None:
    stream = new(request())
    for index in range(3):
        stream.tokens(index, 0, [9], [])
        stream.end(ended(1, index=index))
    await taken(stream)
    assert stream.error is not None
    assert stream.error.code is grpc.StatusCode.INTERNAL


words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map("".join)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(words, st.integers(-3, 0)), min_size=3, max_size=3),
    st.sampled_from(["", "ca", "a€"]),
    st.sampled_from([LENGTH, CANCELLED]),
    st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_a_resumed_stream_gives_exactly_the_rest(
    outputs: list[tuple[str, int]], stop: str, reason: ex.EndReason, break_at: tuple[int, int]
) -> None:
    message = request(n=2, best_of=3, stop=stop, logprobs=True)
    texts, means = [text for text, _ in outputs], [float(mean) for _, mean in outputs]

    async def check() -> None:
        whole, rest = Clients(), Clients()
        stream = new(message)
        await feed(stream, texts, means, reason)
        whole.take(await taken(stream))
        # The client got a whole message of each output, or a part of the second one's tokens.
        rest.offsets = {index: at % (len(whole.by_index[index].ids) + 1) for index, at in enumerate(break_at)}
        again = resumed(message, rest.offsets)
        await feed(again, texts, means, reason)
        rest.take(await taken(again))
        for index, offset in rest.offsets.items():
            full, got = whole.by_index[index], rest.by_index[index]
            assert got.ids[offset:] == full.ids[offset:]
            assert got.logprobs == full.logprobs[offset:]
            assert full.text.endswith(got.text)
            assert offset or got.text == full.text
            assert got.finished == full.finished

    asyncio.run(check())


@pytest.mark.parametrize("positions", [{0: 0, 2: 0}, {1: 3}])
async def test_a_position_that_does_not_exist(positions: dict[int, int]) -> None:
    """Of two ranked outputs the second one has two tokens, though all that were sampled have three or two."""
    stream = resumed(request(n=2, best_of=3), positions)
    await feed(stream, ["z", "zcz", "zc"], [-3.0, -1.0, -2.0])
    await taken(stream)
    assert stream.error is not None
    assert stream.error.code is grpc.StatusCode.OUT_OF_RANGE


async def test_a_position_at_the_end_gives_the_end_alone() -> None:
    stream = resumed(request(n=2, best_of=3), {0: 3, 1: 2})
    await feed(stream, ["z", "zcz", "zc"], [-3.0, -1.0, -2.0])
    events = [one for one in await taken(stream) if one.WhichOneof("event") != "accepted"]
    assert [(one.WhichOneof("event"), one.finished.index) for one in events] == [("finished", 0), ("finished", 1)]
