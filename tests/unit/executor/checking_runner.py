"""A runner without a model: it checks every page it is given and samples by a known rule.

The K/V of a position is a digest of all tokens up to it, kept by (page, slot). A step fails
when any position before its chunk does not hold exactly that, so a stale page, a foreign page,
a write below `write_from` or a hole is found in the step that would have read it.

With `drafts` it knows what comes next and errs at times, so that any number of drafts is right.
"""

from __future__ import annotations

import random
import zlib

import numpy as np

from kvmanager.layout import LOW32
from services.executor.runner.base import Chunk, DraftLimits, Drafts, Lane, Runner, StepResult

VOCAB = 50_000


def next_token(tokens: np.ndarray, seed: int, index: int) -> int:
    """What is sampled after `tokens`; never below 100, so that small ids can serve as stop tokens."""
    digest = zlib.crc32(tokens.tobytes(), zlib.crc32(f"{seed}:{index}".encode()))
    return 100 + digest % (VOCAB - 100)


def logprob(token: int) -> float:
    """Of a token, wherever it is sampled."""
    return -1.0 - token % 89


def expected(prompt: list[int], count: int, seed: int = 0, index: int = 0) -> list[int]:
    """The output of an undisturbed run."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(np.array(tokens, np.uint32), seed, index))
    return tokens[len(prompt) :]


class CheckingRunner(Runner):
    deterministic = True

    def __init__(self, drafts: DraftLimits | None = None) -> None:
        self.drafts = drafts
        self.random = random.Random(1)
        self.accuracy = 0.75  # of a draft
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

    def _draft(self, chunks: list[Chunk]) -> list[int]:
        """Drafts into the lanes; how many each chunk has got."""
        positions = sum(chunk.count for chunk in chunks)
        asked = sum(chunk.drafts for chunk in chunks)
        room = self.drafts.most(positions, asked) if self.drafts is not None else 0
        tried = []
        for lane, start, count, _, sample, most in chunks:
            assert most == 0 or (sample and count == 1)
            known, drafts = start + count, min(most, room)
            for at in range(known, known + drafts):
                token = next_token(lane.tokens[:at], lane.sampling.seed, lane.index)
                lane.tokens[at] = token if self.random.random() < self.accuracy else token + 1
            assert known + drafts < len(lane.tokens), "no place for the token after the drafts"
            room -= drafts
            tried.append(drafts)
        return tried

    def step(self, chunks: list[Chunk]) -> StepResult:
        self.steps += 1
        self.largest_batch = max(self.largest_batch, len(chunks))
        sampled, accepted, tries = (
            np.zeros(len(chunks), np.uint32),
            np.zeros(len(chunks), np.uint32),
            self._draft(chunks),
        )
        for number, (lane, start, count, write_from, sample, _) in enumerate(chunks):
            assert lane.row is not None
            end, right = start + count + tries[number], 0
            self.computed_positions += end - start
            for position in range(end):
                page = int(lane.row[position // self.page_size]) & LOW32
                assert page != 0, "the reserved page is in a row"
                slot = (page, position % self.page_size)
                digest = zlib.crc32(lane.tokens[: position + 1].tobytes())
                if position >= max(start, write_from):
                    self.slots[slot] = digest
                else:
                    assert self.slots.get(slot) == digest, f"position {position} holds another token's K/V"
            if sample:
                for known in range(start + count, end + 1):
                    sampled[number] = next_token(lane.tokens[:known], lane.sampling.seed, lane.index)
                    if known == end or lane.tokens[known] != sampled[number]:
                        break
                    right += 1
                accepted[number] = right
        guesses = [
            logprob(token)
            for (lane, start, count, *_), tried in zip(chunks, tries, strict=True)
            for token in lane.tokens[start + count :][:tried].tolist()
        ]
        drafts = Drafts(np.array(tries, np.uint32), accepted, np.array(guesses, np.float32))
        logprobs = np.array([logprob(token) for token in sampled.tolist()], np.float32)
        return StepResult(sampled, logprobs, drafts if any(tries) else None)

    def close(self) -> None:
        pass
