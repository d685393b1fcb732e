"""The runner on a GPU: graphs and eager steps, alone and in a batch, give the same tokens with --deterministic."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from services.executor.runner.base import Chunk, Lane, SamplingParams
from services.executor.runner.cuda.limits import Limits
from services.executor.runner.cuda.pool import DeviceMemory, page_major
from services.executor.runner.cuda.runner import CudaRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

from gpu.model import TINY, make_packed, total_bytes

PAGE = 16
PAGES = 64
ROW = 12
NEW = 24


@pytest.fixture(scope="module", params=["graphs", "eager"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CudaRunner:
    from services.executor.runner.cuda.gpu_platform import GpuPlatform

    weights = np.zeros(total_bytes(TINY), np.uint8)
    model = make_packed(TINY, tmp_path_factory.mktemp("model"), weights, torch.device("cuda"))
    graphs = () if request.param == "eager" else None
    limits = Limits(PAGE, PAGE * ROW, 4, 64)
    made = CudaRunner(model, GpuPlatform(0), limits, "bfloat16", "bfloat16", True, graphs)
    memory = torch.zeros(PAGES * page_major(TINY, "bfloat16", PAGE).page, dtype=torch.uint8, device="cuda")
    made.map_pool(DeviceMemory(memory.data_ptr(), memory.nbytes, memory), PAGES, PAGE)
    return made


def lane(index: int, length: int) -> Lane:
    tokens = np.zeros(PAGE * ROW + 1, np.uint32)
    tokens[:length] = np.random.default_rng(index).integers(1, TINY.vocab_size, length)
    row = np.arange(1 + index * ROW, 1 + (index + 1) * ROW, dtype=np.uint64)
    return Lane(tokens, length, 0, SamplingParams(temperature=1.0, seed=index), row)


def generate(runner: CudaRunner, lengths: Sequence[tuple[int, int]], chunk: int) -> list[list[int]]:
    """lengths: (lane, prompt). Prompts in chunks, then all decode side by side, a step ahead."""
    lanes = [(lane(index, length), length) for index, length in lengths]
    found: list[list[int]] = []
    for one, length in lanes:
        runner.prepare(one, length)
        for start in range(0, length, chunk):
            count = min(chunk, length - start)
            result = runner.step([Chunk(one, start, count, start, start + count == length)])
        found.append([int(result.tokens[0])])
    flight = None
    for step in range(NEW + 1):
        chunks = [Chunk(one, length + step, 1, length + step, True) for one, length in lanes]
        following = runner.submit(chunks) if step < NEW else None
        if flight is not None:
            for tokens, token in zip(found, runner.collect(flight).tokens, strict=True):
                tokens.append(int(token))
        flight = following
    for one, _ in lanes:
        runner.release(one)
    return found


def test_tokens_depend_neither_on_the_batch_nor_on_chunks(runner: CudaRunner) -> None:
    prompts = [(0, 50), (1, 7), (2, 130)]
    together = generate(runner, prompts, 64)
    for prompt, tokens in zip(prompts, together, strict=True):
        assert generate(runner, [prompt], 13) == [tokens]
    assert len({tuple(tokens) for tokens in together}) == 3, "sequences are not each other's"
