"""Fifty prompts through real stacks: the tokens are transformers', whatever the cache, the chunks and the pool.

In float32; `tests/models` compares the runner alone in the same way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
import transformers

from pagehold.client import Client, make_request
from pagehold.v1 import inference_pb2 as api
from services.executor.modelstore.packed import PackedModel
from tests.conftest import Stack
from tests.models.conftest import smollm2, transformers_smollm2
from tests.models.parity import STEPS, Judge, encode_prompts

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]
__all__ = ["smollm2", "transformers_smollm2"]  # fixtures

Outputs = list[list[int]]
SETTINGS = {
    "as-it-comes": {},
    "no-prefix-cache": {"prefix_cache": False},
    "chunks-of-16": {"max_batch_tokens": 16},
    # 32 pages of 16 tokens: two of the longest sequences, and up to 32 that begin at once.
    "tiny-pool": {"kv_memory": "24MiB", "max_num_seqs": 32},
}


@pytest.fixture(scope="module")
def judge(transformers_smollm2: transformers.PreTrainedModel) -> Iterator[Judge]:
    judge = Judge(transformers_smollm2)
    yield judge
    print(f"\n{judge.positions} different positions judged, {judge.ties} near-ties the other way")


async def _answers(address: str, prompts: Outputs) -> Outputs:
    """All prompts at once, greedy."""
    async with Client(address) as client:

        async def one(prompt: list[int]) -> list[int]:
            asked = make_request(prompt, temperature=0.0, max_tokens=STEPS, ignore_eos=True)
            ids: list[int] = []
            async for response in client.generate(asked):
                ids += response.tokens.token_ids
            return ids

        return list(await asyncio.gather(*map(one, prompts)))


async def _load(address: str) -> api.GetLoadResponse:
    async with Client(address) as client:
        load: api.GetLoadResponse = await client.models.GetLoad(api.GetLoadRequest())
        return load


@pytest.mark.parametrize("name", SETTINGS)
async def test_greedy_output_equals_transformers(
    name: str, start_stack: Callable[..., Stack], smollm2: PackedModel, judge: Judge
) -> None:
    prompts = encode_prompts(smollm2)
    stack = start_stack(dtype="float32", **SETTINGS[name])
    outputs = await _answers(stack.address, prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output) == STEPS
        judge.check(prompt, output)
    if name == "as-it-comes":  # the second time over cached prefixes
        before = await _load(stack.address)
        assert await _answers(stack.address, prompts) == outputs
        after = await _load(stack.address)
        assert after.prefill_tokens - before.prefill_tokens < before.prefill_tokens / 2
    preemptions = (await _load(stack.address)).preemptions
    assert (preemptions > 0) == (name == "tiny-pool"), preemptions
