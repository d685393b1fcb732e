"""A device without arithmetic: K/V and tokens are the model's, every page that is read or written is checked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvmanager.layout import LOW32
from services.executor.runner.base import Chunk, Lane, Runner, StepResult
from tests.faults.simulator.faults import Violation
from tests.faults.simulator.invariants import Pool
from tests.faults.simulator.messages.requests import SHAPE, logprob
from tests.faults.simulator.model import Vector, next_token, next_vector

_SIZE = SHAPE.page_size


class ModelRunner(Runner):
    """Dies between any two slots."""

    deterministic = True

    def __init__(self, pool: Callable[[], Pool], store: Callable[[str], None]) -> None:
        """pool: there from the first attach on. store(name): called before each write of a slot."""
        self._pool = pool
        self._store = store

    def map_pool(self, pool: memoryview, pages: int, page_size: int) -> None:
        pass

    def prepare(self, lane: Lane) -> None:
        lane.device = list[Vector]()  # of the tokens so far

    def copy_slots(self, source: int, target: int, count: int) -> None:
        vectors = self._pool().vectors
        for place in range(count):
            self._store("slot")
            vectors[target, place] = vectors[source, place]

    def step(self, chunks: list[Chunk]) -> StepResult:
        tokens = np.zeros(len(chunks), np.uint32)
        for number, chunk in enumerate(chunks):
            vectors = self._vectors(chunk.lane, chunk.start + chunk.count)
            self._check(chunk, vectors)
            self._write(chunk, vectors)
            if chunk.sample:
                lane = chunk.lane
                tokens[number] = next_token(vectors[-1], lane.index, lane.sampling.seed, SHAPE)
        return StepResult(tokens, np.array([logprob(token) for token in tokens.tolist()], np.float32))

    @staticmethod
    def _vectors(lane: Lane, count: int) -> list[Vector]:
        vectors = lane.device
        assert isinstance(vectors, list), "prepare comes first"
        for token in lane.tokens[len(vectors) : count].tolist():
            vectors.append(next_vector(vectors[-1] if vectors else 0, token))
        return vectors[:count]

    def _check(self, chunk: Chunk, vectors: list[Vector]) -> None:
        """What attention would read: all that lies before what this step writes."""
        pool, row = self._pool(), chunk.lane.row
        assert row is not None
        there = min(max(chunk.start, chunk.write_from), chunk.start + chunk.count)
        words = row[: -(-there // _SIZE)]
        pages = (words & np.uint64(LOW32)).astype(np.int64)
        if (pool.tables.page_word[pages] >> np.uint64(32) != words >> np.uint64(32)).any():
            raise Violation("a step reads a page of another generation")
        wrong = pool.vectors[pages].reshape(-1)[:there] != np.array(vectors[:there], np.int64)
        if wrong.any():
            raise Violation(f"a step reads foreign or unwritten K/V at position {int(wrong.argmax())}")

    def _write(self, chunk: Chunk, vectors: list[Vector]) -> None:
        pool, row = self._pool(), chunk.lane.row
        assert row is not None
        for position in range(max(chunk.start, chunk.write_from), chunk.start + chunk.count):
            self._store("slot")
            pool.write(int(row[position // _SIZE]), position % _SIZE, vectors[position])

    def close(self) -> None:
        pass
