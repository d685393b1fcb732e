"""Two stacks, one of them without speculation: the same answers, and drafts that were right only in the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import pytest

from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from tests.conftest import Stack
from tests.faults.streams import Heard, Load, repeating, request

pytestmark = pytest.mark.stack


def messages() -> list[api.GenerateRequest]:
    """Outputs that repeat their prompt or themselves, and all that a draft must not change."""
    asked = [repeating(number, tokens=60) for number in range(3)]
    asked += [request(number, tokens=60) for number in range(3, 5)]
    several = repeating(5, tokens=40, n=4)
    several.sampling.temperature, several.sampling.seed = 0.7, 5
    penalties = repeating(6, tokens=60)
    penalties.sampling.repetition_penalty, penalties.sampling.frequency_penalty = 1.02, 0.1
    logprobs = repeating(7, tokens=60)
    logprobs.response.logprobs = True
    stops = repeating(8, tokens=60)
    stops.stopping.stop.append("lamp")
    stops.stopping.min_tokens = 10
    return [*asked, several, penalties, logprobs, stops]


async def heard(stack: Stack) -> list[Heard]:
    load = Load(stack.address, messages())
    await load.answers()
    alone = Load(stack.address, [repeating(20, tokens=120)])  # with a step of its own for many drafts
    await alone.answers()
    return load.heard + alone.heard


async def told(stack: Stack) -> tuple[str, api.GetLoadResponse]:
    async with grpc.aio.insecure_channel(stack.address) as channel:
        models = api_grpc.ModelServiceStub(channel)
        info = await models.GetServerInfo(api.GetServerInfoRequest())
        return info.speculation, await models.GetLoad(api.GetLoadRequest())


async def test_speculation_changes_no_answer(start_stack: Callable[..., Stack]) -> None:
    stacks = [start_stack(), start_stack(speculation="off")]
    with_drafts, without = await asyncio.gather(*map(heard, stacks))
    assert [one.answer for one in with_drafts] == [one.answer for one in without]
    for one, other in zip(with_drafts, without, strict=True):
        assert [output.logprobs for output in one.outputs] == [output.logprobs for output in other.outputs]
    (name, load), (off, plain) = [await told(stack) for stack in stacks]
    assert (name, off) == ("ngram", "off")
    assert (plain.draft_tokens, plain.accepted_tokens) == (0, 0)
    assert 60 < load.accepted_tokens <= load.draft_tokens
