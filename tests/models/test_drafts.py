"""The default model with drafts: the tokens and log-probabilities of a run without, bit for bit, in fewer steps."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from services.executor.modelstore.packed import PackedModel
from services.executor.runner.base import Chunk, Lane, SamplingParams
from services.executor.runner.cpu import CpuRunner
from tests.models.paging import TestPool, chunks_of

STEPS = 40  # tokens of each output
SENTENCE = [504, 3575, 6354, 16438, 22225, 690, 260, 20887, 2767, 30, 198]  # any text that goes on as it began
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "log-probabilities": SamplingParams(temperature=0.0, logprobs=True),
    "seeded": SamplingParams(temperature=0.6, seed=11, logprobs=True),
    "filtered": SamplingParams(temperature=0.9, seed=12, top_p=0.8, top_k=40, min_p=0.02, logprobs=True),
    "noisy": SamplingParams(temperature=1.5, seed=14, top_k=5, logprobs=True),  # leaves the text, and comes back to it
    "penalties": SamplingParams(
        temperature=0.5, seed=13, repetition_penalty=1.05, presence_penalty=0.3, frequency_penalty=0.2, logprobs=True
    ),
    "bias": SamplingParams(temperature=0.0, logit_bias=((30, -3.0), (690, 4.0)), logprobs=True),
    "min-tokens": SamplingParams(temperature=0.0, suppressed=(30, 198), min_tokens=17, logprobs=True),
}
Output = tuple[list[int], list[int]]  # tokens; bits of the log-probabilities


@pytest.fixture(scope="module")
def runner(smollm2: PackedModel) -> Iterator[CpuRunner]:
    runner = CpuRunner(smollm2, "bfloat16", "bfloat16", 2)
    yield runner
    runner.close()


class Running:
    """One output on its way."""

    def __init__(self, runner: CpuRunner, pool: TestPool, sampling: SamplingParams, index: int) -> None:
        prompt = (SENTENCE * 6)[: 48 + index]
        self.lane: Lane = pool.lane(prompt, len(prompt) + STEPS, sampling)
        self.lane.index = index
        runner.prepare(self.lane, len(prompt))
        self.known = len(prompt)
        self.logprobs = np.zeros(STEPS, np.float32)

    @property
    def left(self) -> int:
        return len(self.lane.tokens) - self.known

    def take(self, right: int, token: int, logprobs: np.ndarray) -> None:
        first = self.known - self.lane.prompt_length
        self.logprobs[first : first + right + 1] = logprobs
        self.lane.tokens[self.known + right] = token
        self.known += right + 1
        # Above `known` are drafts that were wrong: nothing may depend on them.
        self.lane.tokens[self.known :] = 0

    @property
    def output(self) -> Output:
        return self.lane.tokens[self.lane.prompt_length :].tolist(), self.logprobs.view(np.uint32).tolist()


def outputs(
    runner: CpuRunner, model: PackedModel, samplings: list[SamplingParams], most: int, seed: int = 0
) -> tuple[list[Output], int, int, int]:
    """Of all in one batch; with up to `most` drafts each, by chance. And: steps, drafts that were right and wrong."""
    rng = random.Random(seed)
    pool = TestPool(model.spec, runner, "bfloat16", 80)
    running = [Running(runner, pool, sampling, index) for index, sampling in enumerate(samplings)]
    for one in running:
        result = runner.step(chunks_of(one.lane, one.lane.prompt_length, None))
        one.take(0, int(result.tokens[0]), result.logprobs[:1])
    steps = accepted = rejected = 0
    while todo := [one for one in running if one.left]:
        chunks = [
            Chunk(one.lane, one.known - 1, 1, one.known - 1, True, min(rng.randint(0, most), one.left - 1))
            for one in todo
        ]
        result = runner.step(chunks)
        steps += 1
        drafts, first = result.drafts, 0
        for number, one in enumerate(todo):
            right = int(drafts.right[number]) if drafts is not None else 0
            of_drafts = drafts.logprobs[first : first + right] if drafts is not None else []
            tried = int(drafts.tried[number]) if drafts is not None else 0
            first += tried
            one.take(right, int(result.tokens[number]), np.array([*of_drafts, result.logprobs[number]], np.float32))
            accepted += right
            rejected += tried - right
    return [one.output for one in running], steps, accepted, rejected


@pytest.mark.parametrize("name", SAMPLINGS)
def test_one_sequence(runner: CpuRunner, smollm2: PackedModel, name: str) -> None:
    without, steps, _, _ = outputs(runner, smollm2, [SAMPLINGS[name]], 0)
    assert steps == STEPS - 1
    drafted, fewer, accepted, rejected = outputs(runner, smollm2, [SAMPLINGS[name]], 8)
    assert drafted == without
    assert fewer == steps - accepted
    if name in ("greedy", "log-probabilities"):
        assert accepted > STEPS / 2, "the text goes on as it began"
    if name == "noisy":
        assert accepted > 0 and rejected > 0


@pytest.mark.parametrize("seed", [1, 2])
def test_all_in_one_batch(runner: CpuRunner, smollm2: PackedModel, seed: int) -> None:
    """Chunks of one position and chunks with drafts, and sequences that end before others."""
    assert runner.drafts is not None
    limits = runner.drafts
    try:
        runner.drafts = limits._replace(rows=80)
        samplings = list(SAMPLINGS.values())
        without, _, _, _ = outputs(runner, smollm2, samplings, 0)
        drafted, steps, accepted, _ = outputs(runner, smollm2, samplings, 6, seed)
        assert drafted == without
        assert accepted > 0 and steps < STEPS - 1
    finally:
        runner.drafts = limits


def test_drafts_share_the_room_or_are_what_chunks_were_granted(runner: CpuRunner, smollm2: PackedModel) -> None:
    assert runner.drafts is not None
    limits = runner.drafts
    try:
        runner.drafts = limits._replace(rows=4)
        _, steps, accepted, rejected = outputs(runner, smollm2, [SAMPLINGS["greedy"]], 8)
        assert 0 < accepted + rejected <= 2 * steps, "room for two"
        runner.drafts = limits._replace(rows=0)
        _, steps, accepted, rejected = outputs(runner, smollm2, [SAMPLINGS["greedy"]], 8)
        assert accepted + rejected > 2 * steps
    finally:
        runner.drafts = limits
