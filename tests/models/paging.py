"""A pool and rows for tests of runners: pages in the order they are asked for, from page 1 on."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from kvmanager.layout import KvDtype
from services.executor.modelstore.spec import DecoderSpec
from services.executor.runner.base import Chunk, Lane, Runner, SamplingParams

GREEDY = SamplingParams(temperature=0.0)


class TestPool:
    """Pages filled with NaN, so that a read of an unwritten slot shows."""

    __test__ = False

    def __init__(self, spec: DecoderSpec, runner: Runner, kv_dtype: str, pages: int, page_size: int = 16) -> None:
        self._page_size = page_size
        self._next = 1
        self.pages = pages
        dtype = np.dtype({"bfloat16": ml_dtypes.bfloat16, "int8": np.uint8}.get(kv_dtype, np.float32))
        slot_bytes = KvDtype[kv_dtype.upper()].slot_bytes(spec.head_dim)
        shape = (pages, spec.layers, 2, spec.kv_heads, page_size, slot_bytes)
        # [pages, layers, k and v, kv_heads, page_size, …], as the reference has it; others have an order of theirs.
        self.values = np.empty(shape, np.uint8).view(dtype)
        self.reset()
        self.map_into(runner)

    def map_into(self, runner: Runner) -> None:
        """Lanes are prepared by this runner from here on. Those that are there must be prepared by it again."""
        self._runner = runner
        runner.map_pool(memoryview(self.values.view(np.uint8)).cast("B"), self.pages, self._page_size)

    def lane(self, tokens: list[int], capacity: int, sampling: SamplingParams = GREEDY) -> Lane:
        """A lane that can hold `capacity` tokens, and has pages for them."""
        count = -(-capacity // self._page_size)
        assert self._next + count <= self.pages, "the pool is too small for this test"
        row = np.arange(self._next, self._next + count, dtype=np.uint64) | np.uint64(5 << 32)  # any generation
        self._next += count
        known = np.zeros(capacity, np.uint32)
        known[: len(tokens)] = tokens
        lane = Lane(known, len(tokens), 0, sampling, row)
        self._runner.prepare(lane, len(tokens))
        return lane

    def reset(self) -> None:
        """Takes all pages back and forgets what they hold."""
        self._next = 1
        self.values.view(np.uint8)[...] = 0xFF  # NaN in both types, and as a scale


def chunks_of(lane: Lane, length: int, size: int | None) -> list[Chunk]:
    """Positions [0, length) in chunks of `size`; the last one samples."""
    size = size or length
    starts = range(0, length, size)
    return [Chunk(lane, s, min(size, length - s), s, s + size >= length) for s in starts]


def greedy(runner: Runner, pool: TestPool, prompts: list[list[int]], steps: int, size: int | None) -> list[list[int]]:
    """The prompts as one batch, prefilled in chunks of `size`, then `steps` tokens each."""
    lanes = [pool.lane(prompt, len(prompt) + steps) for prompt in prompts]
    plans = [chunks_of(lane, lane.prompt_length, size) for lane in lanes]
    lengths = [lane.prompt_length for lane in lanes]
    while True:
        batch, members = [], []
        for i, lane in enumerate(lanes):
            if plans[i]:
                chunk = plans[i].pop(0)
            elif lengths[i] < lane.prompt_length + steps:
                chunk = Chunk(lane, lengths[i] - 1, 1, lengths[i] - 1, True)
            else:
                continue
            batch.append(chunk)
            members.append(i)
        if not batch:
            return [lane.tokens[lane.prompt_length :].tolist() for lane in lanes]
        result = runner.step(batch)
        for i, chunk, token in zip(members, batch, result.tokens, strict=True):
            if chunk.sample:
                lanes[i].tokens[lengths[i]] = token
                lengths[i] += 1
