"""The best of several outputs: ranked by the logs, whichever frontend reads them and whatever dies meanwhile."""

from __future__ import annotations

import math

import grpc
import pytest

from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from tests.conftest import Stack
from tests.faults.streams import Heard, Load, generate, request, undisturbed
from tests.faults.test_kill import StartStack

pytestmark = pytest.mark.stack


def ranked(number: int, tokens: int = 48, n: int = 2, best_of: int = 4) -> api.GenerateRequest:
    message = request(number, tokens, seeded=True, n=n, best_of=best_of)
    message.sampling.temperature = 1.5
    message.stopping.stop.extend((",", ".", " the"))
    message.stopping.min_tokens = 8
    return message


def all_of(message: api.GenerateRequest) -> api.GenerateRequest:
    """The same request without a ranking: every output that is sampled, with its log-probabilities."""
    found = api.GenerateRequest()
    found.CopyFrom(message)
    found.request_id, found.n = f"all-{message.request_id}", message.best_of
    found.ClearField("best_of")
    found.response.logprobs = True
    return found


async def resume(stack: Stack, message: api.GenerateRequest, heard: Heard, offsets: dict[int, int]) -> None:
    positions = [api.ResumePosition(index=index, offset=offset) for index, offset in offsets.items()]
    async with grpc.aio.insecure_channel(stack.address) as channel:
        stub = api_grpc.InferenceServiceStub(channel)
        async for response in stub.Resume(api.ResumeRequest(request_id=message.request_id, positions=positions)):
            heard.take(response)


async def test_the_best_by_their_mean_log_probability(stack: Stack) -> None:
    message = ranked(1)
    heard = await generate(stack.address, message)
    sampled = (await generate(stack.address, all_of(message))).outputs
    assert len({len(output.tokens) for output in sampled}) > 1, "a mean would be no other than a sum"
    order = sorted(sampled, key=lambda output: -math.fsum(output.logprobs) / len(output.logprobs))
    assert [output.answer for output in heard.outputs] == [output.answer for output in order[:2]]
    assert not any(output.logprobs for output in heard.outputs), "they were not asked for"


async def test_resumed_at_ranked_offsets(stack: Stack) -> None:
    """Also at one that the output which was sampled under that index never had."""
    message = ranked(3)
    heard = await generate(stack.address, message)
    sampled = (await generate(stack.address, all_of(message))).outputs
    lengths = [len(output.tokens) for output in heard.outputs]
    assert any(len(output.tokens) < length for output, length in zip(sampled, lengths, strict=False)), "nothing shown"
    for offsets in ({}, {0: lengths[0] // 2}, dict(enumerate(lengths))):
        again = Heard.of(message)
        for index, offset in offsets.items():
            again.outputs[index].tokens = heard.outputs[index].tokens[:offset]
        await resume(stack, message, again, offsets)
        assert [output.tokens for output in again.outputs] == [output.tokens for output in heard.outputs]
        assert [output.reason for output in again.outputs] == [output.reason for output in heard.outputs]
    for offsets in ({0: lengths[0] + 1}, {2: 0}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await resume(stack, message, Heard.of(message), offsets)
        assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE


@pytest.mark.parametrize("component", ["executor", "kvmanager", "frontend"])
async def test_killed_while_outputs_are_held(start_stack: StartStack, component: str) -> None:
    stack = start_stack()
    held = [ranked(number, tokens=96) for number in range(2)]
    for message in held:
        message.stopping.ClearField("stop")
    messages = [*held, request(7, tokens=80)]
    reference = await undisturbed(stack.address, messages)
    load = Load(stack.address, messages, resume=True)
    await load.reach(20)

    stack.kill(component)
    assert not any(output.tokens for heard in load.heard[:2] for output in heard.outputs), "nothing is held"
    assert await load.answers() == reference
