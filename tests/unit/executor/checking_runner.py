"""A runner without a model: it checks every page it is given and samples by a known rule.

The K/V of a position is a digest of all tokens up to it, kept by (page, slot). A step fails
when any position before its chunk does not hold exactly that, so a stale page, a foreign page,
a write below `write_from` or a hole is found in the step that would have read it.
"""

from __future__ import annotations

import zlib

import numpy as np

from kvmanager.layout import LOW32
from services.executor.runner.base import Chunk, Lane, Runner, StepResult

VOCAB = 50_000


def next_token(tokens: np.ndarray, seed: int, index: int) -> int:
    """What is sampled after `tokens`; never below 100, so that small ids can serve as stop tokens."""
    digest = zlib.crc32(tokens.tobytes(), zlib.crc32(f"{seed}:{index}".encode()))
    return 100 + digest % (VOCAB - 100)


def expected(prompt: list[int], count: int, seed: int = 0, index: int = 0) -> list[int]:
    """The output of an undisturbed run."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(np.array(tokens, np.uint32), seed, index))
    return tokens[len(prompt) :]


class CheckingRunner(Runner):
    deterministic = True

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], int] = {}  # (page, slot) -> digest of the tokens up to there
        self.page_size = 0
        self.steps = 0
        self.computed_positions = 0
        self.largest_batch = 0
        self.copied_slots = 0

    def map_pool(self, pool: memoryview, pages: int, page_size: int) -> None:
        self.page_size = page_size

    def prepare(self, lane: Lane, known: int) -> None:
        assert lane.row is not None

    def copy_slots(self, source: int, target: int, count: int) -> None:
        assert source != target and 0 < count <= self.page_size
        self.copied_slots += count
        for slot in range(count):
            # What is not there is not copied: the step that would read it finds the hole.
            self.slots.pop((target, slot), None)
            if (source, slot) in self.slots:
                self.slots[target, slot] = self.slots[source, slot]

    def step(self, chunks: list[Chunk]) -> StepResult:
        self.steps += 1
        self.largest_batch = max(self.largest_batch, len(chunks))
        sampled = np.zeros(len(chunks), np.uint32)
        for number, (lane, start, count, write_from, sample) in enumerate(chunks):
            assert lane.row is not None
            self.computed_positions += count
            for position in range(start + count):
                page = int(lane.row[position // self.page_size]) & LOW32
                assert page != 0, "the reserved page is in a row"
                slot = (page, position % self.page_size)
                digest = zlib.crc32(lane.tokens[: position + 1].tobytes())
                if position >= max(start, write_from):
                    self.slots[slot] = digest
                else:
                    assert self.slots.get(slot) == digest, f"position {position} holds another token's K/V"
            if sample:
                sampled[number] = next_token(lane.tokens[: start + count], lane.sampling.seed, lane.index)
        return StepResult(sampled, np.full(len(chunks), -1.0, np.float32))

    def close(self) -> None:
        pass
