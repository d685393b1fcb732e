"""Outputs of one request share the pages of their prompt, and nobody can tell from the tokens."""

from __future__ import annotations

import asyncio

import pytest

from pagehold.runtime.statedir import StateDir
from pagehold.v1 import inference_pb2 as api
from tests.conftest import Stack
from tests.faults.seen import look, map_tables
from tests.faults.streams import Answer, Load, undisturbed
from tests.faults.test_kill import StartStack

pytestmark = pytest.mark.stack

OUTPUTS, PROMPT, TOKENS = 8, 512, 64


def message(name: str, first: int, outputs: int = 1, prompt: int = PROMPT) -> api.GenerateRequest:
    ids = [1000 + (first + 7 * place) % 20_000 for place in range(prompt)]
    found = api.GenerateRequest(request_id=name, token_ids=api.TokenIds(ids=ids), n=outputs)
    found.sampling.seed = 7
    found.stopping.max_tokens, found.stopping.ignore_eos = TOKENS, True
    return found


async def peak(stack: Stack, messages: list[api.GenerateRequest]) -> tuple[list[Answer], int]:
    """The answers, and the most pages that rows held at a time."""
    state = StateDir(stack.state_dir)
    tables, most = map_tables(state), 0
    answers = asyncio.create_task(Load(stack.address, messages).answers())
    while not answers.done():
        most = max(most, len({word for row in look(state, tables).rows.values() for word in row.entries}))
        await asyncio.sleep(0.005)
    return await answers, most


async def test_eight_outputs_take_a_quarter_of_the_pages_of_eight_requests(start_stack: StartStack) -> None:
    stack = start_stack(prefix_cache=False)
    (forked,), together = await peak(stack, [message("one", 0, OUTPUTS)])
    answers, alone = await peak(stack, [message(f"alone-{number}", number) for number in range(OUTPUTS)])
    assert all(len(answer.tokens) == TOKENS for answer in (*answers, forked, *forked.others))
    print(f"\npeak pages: {together} for one request with {OUTPUTS} outputs, {alone} for {OUTPUTS} requests")
    assert 0 < together <= alone / 4
    # A prompt that ends within a page: each fork begins with a copy.
    odd = message("odd", 3, 4, prompt=43)
    reference = [forked, *await undisturbed(stack.address, [odd])]
    stack.stop()

    plain = start_stack(prefix_cache=False, fork=False)
    assert await undisturbed(plain.address, [message("one", 0, OUTPUTS), odd]) == reference
