"""Slots that were copied from another page are as good as computed ones: the same bits, all layers, and no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvmanager.layout import LOW32
from services.executor.modelstore.packed import PackedModel
from services.executor.modelstore.store import open_model
from services.executor.runner.base import Chunk
from services.executor.runner.cpu import CpuRunner
from services.executor.runner.reference import ReferenceRunner
from tests.models.paging import TestPool
from tests.models.tiny import TINY, save_tiny
from tests.planes import to_slots

PAGE_SIZE = 8
LENGTH = 21  # two pages and five slots of a third
COPIED = LENGTH % PAGE_SIZE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder: Path = tmp_path_factory.mktemp("copy")
    save_tiny(TINY[0], folder / "model")
    return open_model(str(folder / "model"), folder / "cache", progress=False)


@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [("cpu", "float32"), ("cpu", "bfloat16"), ("cpu", "int8"), ("reference", "float32"), ("reference", "bfloat16")],
)
def test_a_copied_page_answers_as_the_one_it_was_copied_from(model: PackedModel, name: str, kv_dtype: str) -> None:
    dtype = "bfloat16" if kv_dtype == "int8" else kv_dtype
    is_cpu = name == "cpu"
    runner = CpuRunner(model, dtype, kv_dtype, threads=1) if is_cpu else ReferenceRunner(model, dtype)
    try:
        pool = TestPool(model.spec, runner, kv_dtype, pages=12, page_size=PAGE_SIZE)
        tokens = np.random.default_rng(5).integers(0, model.spec.vocab_size, LENGTH).tolist()
        first, second = pool.lane(tokens, LENGTH), pool.lane(tokens, LENGTH)
        assert first.row is not None and second.row is not None
        runner.step([Chunk(first, 0, LENGTH, 0, True)])
        pages = list(zip(*((lane.row & np.uint64(LOW32)).tolist() for lane in (first, second)), strict=True))
        for source, target in pages[:2]:
            runner.copy_slots(source, target, PAGE_SIZE)
        runner.copy_slots(*pages[2], COPIED)
        copied = pool.values[pages[2][1]][None]
        if is_cpu:
            planes = copied.view(np.uint8).reshape(*copied.shape[:4], -1)
            copied = to_slots(planes, copied.dtype, PAGE_SIZE, model.spec.head_dim)
        # [1, layers, k and v, kv_heads, slots, …]; what was never written is as it was.
        assert (copied[..., COPIED:, :].view(np.uint8) == 0xFF).all()
        again = [runner.logits([Chunk(lane, LENGTH - 1, 1, LENGTH, True)]) for lane in (first, second)]
        assert (again[0] == again[1]).all()
    finally:
        runner.close()
