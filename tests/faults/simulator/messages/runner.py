"""A device without arithmetic: K/V and tokens are the model's, every page that is read or written is checked.

With depth 1 a step reads its rows when it is submitted, and does its work as late as it may: when it is collected.
With drafts it guesses three tokens of four right, and writes the K/V of all its guesses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kvmanager.layout import LOW32, U32, U64
from services.executor.runner.base import Chunk, DraftLimits, Drafts, Lane, Runner, StepResult
from tests.faults.simulator.faults import Violation
from tests.faults.simulator.invariants import Pool
from tests.faults.simulator.messages.requests import SHAPE, logprob
from tests.faults.simulator.model import Vector, next_token, next_vector

_SIZE = SHAPE.page_size


class Work(NamedTuple):
    """A chunk under way."""

    chunk: Chunk
    row: U64  # as it was when the step was submitted
    vectors: list[Vector]  # of the lane's tokens so far


Step = list[Work]


class ModelRunner(Runner):
    """Dies between any two slots."""

    deterministic = True

    def __init__(
        self, pool: Callable[[], Pool], store: Callable[[str], None], depth: int, drafts: DraftLimits | None
    ) -> None:
        """pool: there from the first attach on. store(name): called before each write of a slot."""
        self.depth = depth
        self.drafts = drafts
        self._steps: deque[Step] = deque()  # under way
        self._pool = pool
        self._store = store

    def map_pool(self, pool: memoryview, pages: int, page_size: int) -> None:
        pass

    def prepare(self, lane: Lane, known: int) -> None:
        lane.device = list[Vector]()  # of the tokens so far

    def copy_slots(self, source: int, target: int, count: int) -> None:
        vectors = self._pool().vectors
        for place in range(count):
            self._store("slot")
            vectors[target, place] = vectors[source, place]

    def check_unused(self, lane: Lane) -> None:
        """Raises Violation when a step under way uses the lane's row."""
        if any(work.chunk.lane is lane for step in self._steps for work in step):
            raise Violation("a row is given back that a step under way uses")

    def submit(self, chunks: list[Chunk]) -> Step:
        step: Step = []
        for chunk in chunks:
            row, vectors = chunk.lane.row, chunk.lane.device
            assert row is not None and isinstance(vectors, list), "prepare comes first"
            step.append(Work(chunk, row.copy() if self.depth else row, vectors))
        self._steps.append(step)
        return step

    def collect(self, ticket: object) -> StepResult:
        step = self._steps.popleft()
        assert step is ticket, "steps are collected in order"
        return self._compute(step)

    def step(self, chunks: list[Chunk]) -> StepResult:
        return self.collect(self.submit(chunks))

    def _compute(self, step: Step) -> StepResult:
        tokens, tried, right = (np.zeros(len(step), np.uint32) for _ in range(3))
        positions = sum(work.chunk.count for work in step)
        asked = sum(work.chunk.drafts for work in step)
        room = self.drafts.most(positions, asked) if self.drafts is not None else 0
        of_drafts: list[float] = []
        for number, (chunk, row, lane_vectors) in enumerate(step):
            lane, end = chunk.lane, chunk.start + chunk.count
            vectors = self._vectors(lane_vectors, lane.tokens, end)
            tried[number] = drafts = min(chunk.drafts, room)
            room -= drafts
            self._guess(lane, end, drafts, vectors)
            self._check(chunk, row, vectors)
            self._write(chunk, row, vectors)
            if chunk.sample:
                known, token = end, self._next(lane, vectors[end - 1])
                while known < end + drafts and token == lane.tokens[known]:
                    known, token = known + 1, self._next(lane, vectors[known])
                tokens[number], right[number] = token, known - end
                of_drafts += [logprob(guess) for guess in lane.tokens[end : end + drafts].tolist()]
                if len(lane_vectors) == end:  # the next step's input, on the device
                    lane_vectors += [*vectors[end:known], next_vector(vectors[known - 1], token)]
        judged = Drafts(tried, right, np.array(of_drafts, np.float32)) if tried.any() else None
        return StepResult(tokens, np.array([logprob(token) for token in tokens.tolist()], np.float32), judged)

    @staticmethod
    def _next(lane: Lane, vector: Vector) -> int:
        return next_token(vector, lane.index, lane.sampling.seed, SHAPE)

    def _guess(self, lane: Lane, end: int, count: int, vectors: list[Vector]) -> None:
        """Drafts behind position `end` of a lane, and their vectors behind those that are there."""
        for position in range(end, end + count):
            self._store("slot")
            token = self._next(lane, vectors[-1])
            is_wrong = hash((vectors[-1], 1)) % 4 == 0  # of numbers: the same in every process
            lane.tokens[position] = token = token - 1 if is_wrong else token
            vectors.append(next_vector(vectors[-1], token))

    @staticmethod
    def _vectors(vectors: list[Vector], tokens: U32, count: int) -> list[Vector]:
        for token in tokens[len(vectors) : count].tolist():
            vectors.append(next_vector(vectors[-1] if vectors else 0, token))
        return vectors[:count]

    def _check(self, chunk: Chunk, row: U64, vectors: list[Vector]) -> None:
        """What attention would read: all that lies before what this step writes."""
        pool = self._pool()
        there = min(max(chunk.start, chunk.write_from), chunk.start + chunk.count)
        words = row[: -(-there // _SIZE)]
        pages = (words & np.uint64(LOW32)).astype(np.int64)
        if (pool.tables.page_word[pages] >> np.uint64(32) != words >> np.uint64(32)).any():
            raise Violation("a step reads a page of another generation")
        wrong = pool.vectors[pages].reshape(-1)[:there] != np.array(vectors[:there], np.int64)
        if wrong.any():
            raise Violation(f"a step reads foreign or unwritten K/V at position {int(wrong.argmax())}")

    def _write(self, chunk: Chunk, row: U64, vectors: list[Vector]) -> None:
        """Of the chunk, and of the drafts behind it."""
        pool = self._pool()
        for position in range(max(chunk.start, chunk.write_from), len(vectors)):
            self._store("slot")
            pool.write(int(row[position // _SIZE]), position % _SIZE, vectors[position])

    def close(self) -> None:
        pass
