"""The real model's tokens and logits against transformers, on the same weights rounded once to bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from transformers.initialization import no_init_weights

from services.executor.modelstore.packed import PackedModel
from services.executor.runner.base import Runner
from services.executor.runner.cpu import CpuRunner
from services.executor.runner.reference import ReferenceRunner
from tests.models.paging import TestPool, chunks_of, greedy
from tests.models.prompts import prompt_texts

STEPS = 64
GAP = 1e-3  # logits closer than this in the reference may come in either order
POOL_PAGES = 32 * 24


@dataclass
class Judge:
    """transformers in float32, teacher-forced on what a runner wrote. Equal outputs are judged once."""

    model: transformers.PreTrainedModel
    judged: set[tuple[int, ...]] = field(default_factory=set)
    positions: int = 0
    ties: int = 0

    def check(self, prompt: list[int], output: list[int]) -> None:
        """Each token is the reference's greedy choice after the tokens before it, or within GAP of it.

        Stronger than comparing up to a first difference: what follows a tie is checked as well.
        """
        text = tuple(prompt + output)
        if text in self.judged:
            return
        self.judged.add(text)
        with torch.inference_mode():
            logits = self.model(torch.tensor([text[:-1]]), logits_to_keep=len(output)).logits[0]
        chosen = logits[torch.arange(len(output)), torch.tensor(output)]
        gaps = logits.max(dim=-1).values - chosen
        self.positions += len(output)
        self.ties += int((gaps > 0).sum())
        worst = int(gaps.argmax())
        assert float(gaps[worst]) < GAP, f"token {worst} of {output}: the reference prefers another by {gaps[worst]}"


@pytest.fixture(scope="module")
def judge(transformers_smollm2: transformers.PreTrainedModel) -> Iterator[Judge]:
    judge = Judge(transformers_smollm2)
    yield judge
    print(f"\ngreedy: {judge.positions} positions judged, {judge.ties} near-ties taken the other way")


@pytest.fixture(scope="module")
def prompts(smollm2: PackedModel) -> list[list[int]]:
    tokenizer = Tokenizer.from_buffer(smollm2.tokenizer_json)
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in prompt_texts()]
    assert len(prompts) == 50 and len({tuple(prompt) for prompt in prompts}) == 50
    return prompts


@pytest.fixture(scope="module")
def float32_runner(smollm2: PackedModel) -> Iterator[tuple[Runner, TestPool]]:
    runner = CpuRunner(smollm2, "float32", "float32", threads=2, isa=None)
    yield runner, TestPool(smollm2.spec, runner, "float32", POOL_PAGES)
    runner.close()


def in_bfloat16(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same model as transformers makes it in bfloat16: the rotary frequencies stay float32."""
    with no_init_weights():  # random values for all of them would take seconds
        half = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    torch.testing.assert_close(half.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=0, atol=0)
    return half.eval()


@pytest.mark.parametrize(("batch", "chunk"), [(32, 16), (32, 64), (32, None), (1, None), (1, 16)])
def test_greedy_output_equals_transformers(
    float32_runner: tuple[Runner, TestPool], judge: Judge, prompts: list[list[int]], batch: int, chunk: int | None
) -> None:
    runner, pool = float32_runner
    # Alone in chunks of 16: a part of them, the ones that need several chunks.
    chosen = [prompt for prompt in prompts if len(prompt) > 16] if (batch, chunk) == (1, 16) else prompts
    for first in range(0, len(chosen), batch):
        group = chosen[first : first + batch]
        pool.reset()
        for prompt, output in zip(group, greedy(runner, pool, group, STEPS, chunk), strict=True):
            judge.check(prompt, output)


def test_the_reference_runner_agrees(smollm2: PackedModel, judge: Judge, prompts: list[list[int]]) -> None:
    runner = ReferenceRunner(smollm2)
    pool = TestPool(smollm2.spec, runner, "float32", POOL_PAGES)
    group = prompts[2:6]
    for prompt, output in zip(group, greedy(runner, pool, group, 8, 16), strict=True):
        judge.check(prompt, output)


def test_bfloat16_errs_no_more_than_transformers_bfloat16(
    smollm2: PackedModel, judge: Judge, prompts: list[list[int]], float32_runner: tuple[Runner, TestPool]
) -> None:
    """Teacher-forced on the float32 reference's own greedy text."""
    runner, pool = float32_runner
    group = [prompts[i] for i in (2, 4, 7, 9, 17, 29, 40, 44)]
    pool.reset()
    texts = [prompt + output for prompt, output in zip(group, greedy(runner, pool, group, 48, None), strict=True)]

    half = in_bfloat16(judge.model)
    with torch.inference_mode():
        exact = np.concatenate([judge.model(torch.tensor([text])).logits[0].numpy() for text in texts])
        theirs = np.concatenate([half(torch.tensor([text])).logits[0].float().numpy() for text in texts])
    del half
    runner = CpuRunner(smollm2, "bfloat16", "bfloat16", threads=2, isa=None)
    try:
        pool = TestPool(smollm2.spec, runner, "bfloat16", 256)
        ours = []
        for text in texts:
            lane = pool.lane(text, len(text))
            ours += [runner.logits([chunk]) for chunk in chunks_of(lane, len(text), 64)]
    finally:
        runner.close()
    got = np.concatenate(ours)

    our_error, their_error = float(np.std(got - exact)), float(np.std(theirs - exact))
    best = exact.argmax(-1)
    our_differences, their_differences = int((got.argmax(-1) != best).sum()), int((theirs.argmax(-1) != best).sum())
    print(
        f"\nbfloat16 over {len(best)} positions: logit error {our_error:.5f}, transformers' {their_error:.5f} "
        f"(ratio {our_error / their_error:.3f}); other argmax at {our_differences}, transformers' {their_differences}"
    )
    assert their_error > 0
    assert our_error <= 1.1 * their_error
    assert our_differences <= 1.5 * their_differences
