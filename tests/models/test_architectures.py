"""Every architecture and flag, on small random weights: logits equal transformers' on the same rounded weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from services.executor.modelstore.packed import PackedModel, Weights
from services.executor.modelstore.store import open_model
from services.executor.runner.base import Chunk, Runner
from services.executor.runner.reference import ReferenceRunner
from tests.models.paging import TestPool
from tests.models.tiny import TINY, Tiny, save_tiny

LENGTH = 90  # beyond llama3-rope's original positions and several sliding windows


def cpu_runner(model: PackedModel, dtype: str) -> Runner:
    from services.executor.runner.cpu import CpuRunner

    return CpuRunner(model, dtype, dtype, threads=1, isa=None)


RUNNERS = {"reference": ReferenceRunner, "cpu": cpu_runner}


@pytest.fixture(scope="module", params=TINY, ids=lambda tiny: tiny.name)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """The checkpoint's folder and transformers' logits [LENGTH, vocab] of a fixed text."""
    tiny: Tiny = request.param
    folder = tmp_path_factory.mktemp(tiny.name)
    theirs = save_tiny(tiny, folder / "model")
    with torch.inference_mode():
        logits = theirs(torch.tensor([text(tiny.config().vocab_size)])).logits[0]
    return folder / "model", logits


@pytest.fixture(scope="module")
def case(saved: tuple[Path, torch.Tensor]) -> tuple[PackedModel, torch.Tensor]:
    """The packed model, and the logits."""
    folder, logits = saved
    return open_model(str(folder), folder.parent / "cache", progress=False), logits


def text(vocab: int) -> list[int]:
    return np.random.default_rng(3).integers(0, vocab, LENGTH).tolist()


@pytest.mark.parametrize("runner_name", RUNNERS)
def test_logits_equal_transformers(case: tuple[PackedModel, torch.Tensor], runner_name: str) -> None:
    model, wanted = case
    runner = RUNNERS[runner_name](model, "float32")
    try:
        pool = TestPool(model.spec, runner, "float32", pages=24, page_size=8)
        other = pool.lane([9] * 20, 20)
        lane = pool.lane(text(model.spec.vocab_size), LENGTH)
        # Two chunks, then single positions, with another sequence in the batch.
        first = runner.logits([Chunk(lane, 0, 37, 0, True), Chunk(other, 0, 20, 0, True)])[:37]
        rest = [runner.logits([Chunk(lane, 37, 50, 37, True)])]
        rest += [runner.logits([Chunk(lane, i, 1, i, True)]) for i in range(87, LENGTH)]
        ours = torch.from_numpy(np.concatenate([first, *rest]))
    finally:
        runner.close()
    error = float((ours - wanted).abs().max())
    print(f"largest logit error {error:.2e} of {float(wanted.abs().max()):.1f}")
    assert error < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_integers_compute_about_the_same(saved: tuple[Path, torch.Tensor], dtype: str) -> None:
    """Rotated and rounded to 8 bits: a rotation that is not undone somewhere leaves nothing of the logits."""
    folder, wanted = saved
    model = open_model(str(folder), folder.parent / "cache", progress=False, weights=Weights.INT8)
    assert not model.spec.tied_embeddings
    runner = cpu_runner(model, dtype)
    try:
        pool = TestPool(model.spec, runner, dtype, pages=24, page_size=8)
        lane = pool.lane(text(model.spec.vocab_size), LENGTH)
        error = torch.from_numpy(runner.logits([Chunk(lane, 0, LENGTH, 0, True)])) - wanted
    finally:
        runner.close()
    print(f"logit error {float(error.std() / wanted.std()):.3f} of their deviation")
    assert float(error.std()) < 0.06 * float(wanted.std())


def test_a_masked_write_changes_no_page(case: tuple[PackedModel, torch.Tensor]) -> None:
    """A position run again for its logits alone reads the pages and leaves them."""
    model, wanted = case
    runner = ReferenceRunner(model)
    pool = TestPool(model.spec, runner, "float32", pages=24, page_size=8)
    lane = pool.lane(text(model.spec.vocab_size), LENGTH)
    runner.logits([Chunk(lane, 0, 40, 0, True)])
    pool.values[lane.row[39 // 8] & 0xFFFF, :, :, :, 39 % 8] += 0.5
    before = pool.values.copy()
    again = torch.from_numpy(runner.logits([Chunk(lane, 39, 1, 40, True)])[0])
    np.testing.assert_array_equal(pool.values, before)
    assert float((again - wanted[39]).abs().max()) > 1e-4  # it read the changed slot


def test_folder_of_the_fixture_is_cached(case: tuple[PackedModel, torch.Tensor]) -> None:
    model, _ = case
    source: Path = model.folder.parent.parent / "model"
    assert open_model(str(source), model.folder.parent, progress=False).fingerprint == model.fingerprint
