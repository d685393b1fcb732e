"""The real model's tokens and logits against transformers, on the same weights rounded once to bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import transformers

from services.executor.modelstore.packed import PackedModel, TensorKind, Weights
from services.executor.modelstore.store import open_model
from services.executor.runner.base import Runner
from services.executor.runner.cpu import CpuRunner
from services.executor.runner.reference import ReferenceRunner
from tests.models.paging import TestPool, chunks_of, greedy
from tests.models.parity import BFLOAT16_PROMPTS, POOL_PAGES, Judge, bfloat16_errors, encode_prompts, judge_greedy

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def judge(transformers_smollm2: transformers.PreTrainedModel) -> Iterator[Judge]:
    judge = Judge(transformers_smollm2)
    yield judge
    print(f"\ngreedy: {judge.positions} different positions judged, {judge.ties} near-ties the other way")


@pytest.fixture(scope="module")
def prompts(smollm2: PackedModel) -> list[list[int]]:
    return encode_prompts(smollm2)


@pytest.fixture(scope="module")
def float32_runner(smollm2: PackedModel) -> Iterator[tuple[Runner, TestPool]]:
    runner = CpuRunner(smollm2, "float32", "float32", threads=2, isa=None)
    yield runner, TestPool(smollm2.spec, runner, "float32", POOL_PAGES)
    runner.close()


@pytest.mark.parametrize(
    ("batch", "chunk", "longer_than", "every"),
    [
        pytest.param(32, 16, 0, 1, id="batch-32-chunks-16"),
        pytest.param(32, 64, 64, 1, id="batch-32-chunks-64"),
        pytest.param(32, None, 16, 1, id="batch-32-whole-prompts"),
        pytest.param(1, None, 0, 4, id="alone"),
    ],
)
def test_greedy_output_equals_transformers(
    float32_runner: tuple[Runner, TestPool],
    judge: Judge,
    prompts: list[list[int]],
    batch: int,
    chunk: int | None,
    longer_than: int,
    every: int,
) -> None:
    chosen = [prompt for prompt in prompts if len(prompt) > longer_than][::every]
    assert len(chosen) >= 4
    judge_greedy(judge, *float32_runner, chosen, batch, chunk)


def test_the_reference_runner_agrees(smollm2: PackedModel, judge: Judge, prompts: list[list[int]]) -> None:
    runner = ReferenceRunner(smollm2)
    pool = TestPool(smollm2.spec, runner, "float32", 64)
    group = prompts[2:5]
    for prompt, output in zip(group, greedy(runner, pool, group, 8, 4), strict=True):
        judge.check(prompt, output)


def test_bfloat16_errs_no_more_than_transformers_bfloat16(
    smollm2: PackedModel, judge: Judge, prompts: list[list[int]], float32_runner: tuple[Runner, TestPool]
) -> None:
    errors = bfloat16_errors(judge, smollm2, *float32_runner, [prompts[i] for i in BFLOAT16_PROMPTS])
    print(f"\n{errors}")
    assert errors.theirs > 0
    assert errors.ours <= 1.1 * errors.theirs
    assert errors.our_differences <= 1.5 * errors.their_differences


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_files_own_blocks_change_no_bit(smollm2: PackedModel, prompts: list[list[int]], dtype: str) -> None:
    """The default model's matrices have 4 and 8 bits in its file; `--weights auto` computes with these."""
    blocks = open_model(None, weights=Weights.FILE)
    assert {tensor.encoding for tensor in blocks.tensors.values() if tensor.kind is TensorKind.GATE_UP} == {"int4"}
    assert blocks.weights.nbytes < 0.4 * smollm2.weights.nbytes
    found = []
    for model in (smollm2, blocks):
        runner = CpuRunner(model, dtype, dtype, threads=2)
        pool = TestPool(model.spec, runner, dtype, 64)
        found.append([runner.logits(chunks_of(pool.lane(p, len(p) + 1), len(p), None)) for p in prompts[:4]])
        runner.close()
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_bits_by_integers_err_by_the_inputs_codes_alone(
    smollm2: PackedModel, prompts: list[list[int]], dtype: str
) -> None:
    """`--weights int4`: the file's own blocks again, by inputs of 8 bits."""
    found = []
    for model in (smollm2, open_model(None, weights=Weights.INT4_INTEGERS)):
        runner = CpuRunner(model, dtype, dtype, threads=2)
        pool = TestPool(model.spec, runner, dtype, 64)
        logits = [runner.logits(chunks_of(pool.lane(p, len(p) + 1), len(p), None)) for p in prompts[:4]]
        found.append(np.concatenate(logits))
        runner.close()
    error = (found[1] - found[0]).std() / found[0].std()
    print(f"logit error {error:.4f} of their deviation")
    assert 0.001 < error < 0.06
