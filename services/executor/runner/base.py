"""What the executor asks of a device: run one step over sequences whose K/V live in pages.

A runner never touches progress words, rows or records: it reads tokens and block tables
in place, writes K/V into pages, and returns the sampled tokens. One that drafts (`Runner.drafts`) also writes tokens
into the slots behind a chunk, which hold nothing yet, and computes the chunk on over them.

    submit a | submit b | collect a | submit c | collect b     a runner of depth 1: the host plans b while a runs
    submit a | collect a | submit b | collect b                one of depth 0

In a step that is submitted before the one before it was collected, a chunk may begin at a position whose
token the host does not have yet: the runner keeps what it has sampled where its next step finds it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvmanager.layout import F32, U32, U64


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Resolved: every default is filled in. Filters are off at the value named."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0  # over the output
    logit_bias: tuple[tuple[int, float], ...] = ()
    # Never sampled while the output has fewer than `min_tokens` tokens.
    suppressed: tuple[int, ...] = ()
    min_tokens: int = 0
    logprobs: bool = False


@dataclass(slots=True)
class Lane:
    """One sequence as a runner sees it; lives as long as the sequence is scheduled.

    `row` is the block table: u64 entries, page id in the low half. `device` is the
    runner's own: what it prepared once for this lane (`Runner.prepare`).
    """

    tokens: U32  # [capacity], token at each position, prompt included
    prompt_length: int
    index: int  # of the output, part of the noise counter
    sampling: SamplingParams
    row: U64 | None = None  # [entries]
    device: object = field(default=None)


class Chunk(NamedTuple):
    """Positions [start, start + count) of a lane, computed in one step."""

    lane: Lane
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody wants of a chunk
    write_from: int  # K/V is written only at positions >= this
    sample: bool  # sample the token at position start + count
    drafts: int = 0  # so many positions more may be computed and sampled after, over guesses at their tokens


class Drafts(NamedTuple):
    """What became of the drafts of a step. The right ones of a chunk are in its lane, from start + count on."""

    tried: U32  # [chunks]
    right: U32  # [chunks]; the first so many are what would have been sampled one by one
    logprobs: F32  # [all tried]; of the right ones, as in StepResult


class StepResult(NamedTuple):
    tokens: U32  # [chunks]; the one after the right drafts; 0 where nothing was sampled
    logprobs: F32  # [chunks]; log-probability of the token before temperature and filters
    drafts: Drafts | None = None


class DraftLimits(NamedTuple):
    """How many drafts pay on a device, for what a position costs depends on how many there are in the step.

    Up to `rows` one more costs little: chunks share that room, whoever finds drafts. Beyond, each draft has to earn
    its own row: chunks are granted so many as are likely to be right, and use no more.
    """

    each: int  # behind one chunk
    rows: int  # a step of few positions may grow to so many
    granted: int = 0  # where there is no room, to so many

    def room(self, positions: int) -> int:
        """How many drafts the chunks of so many positions share: fewer, the less it costs to do without them.

        0: they have what each was granted, which is worth more than a draft or so for each.
        """
        room = max(self.rows - 2 * positions, 0)
        return 0 if self.granted and room < 2 * positions else room

    def most(self, positions: int, asked: int) -> int:
        """How many drafts a step of so many positions has at most, where its chunks ask for so many in all."""
        return min(self.room(positions) or asked, asked)

    def within(self, max_batch_tokens: int) -> DraftLimits:
        """The same for steps of so many positions at most."""
        return self._replace(rows=min(self.rows, max_batch_tokens), granted=min(self.granted, max_batch_tokens))


class Runner(ABC):
    """A device that can run steps. One thread calls it."""

    deterministic: bool  # a row's result does not depend on its batch or chunking
    depth: int = 0  # steps that may be submitted before the one before them is collected: 0 or 1
    # None: it does not draft. Only a deterministic runner of depth 0 can: a draft is judged by what is sampled without.
    drafts: DraftLimits | None = None

    @abstractmethod
    def map_pool(self, pool: memoryview, pages: int, page_size: int) -> None:
        """Gives the runner the pages. Called once, before the first step.

        pool: [pages][layer][k, v][kv_head][token] slots of the runner's K/V dtype, as in `kvmanager.layout`.
        """

    @abstractmethod
    def prepare(self, lane: Lane, known: int) -> None:
        """Sets `lane.device`; again whenever `lane.row` has changed. lane.tokens[:known] are there."""

    def release(self, lane: Lane) -> None:  # noqa: B027  # most runners keep nothing of a lane
        """The lane has lost its row. A step that it is part of may still be under way."""

    @abstractmethod
    def copy_slots(self, source: int, target: int, count: int) -> None:
        """Copies K and V of the first `count` tokens of page `source`, all layers, into page `target`.

        Complete when it returns.
        """

    @abstractmethod
    def step(self, chunks: list[Chunk]) -> StepResult:
        """Computes all chunks. Every page they touch is in their rows."""

    def submit(self, chunks: list[Chunk]) -> object:
        """Begins a step, behind the one that may be under way; the ticket to collect it with."""
        return self.step(chunks)

    def collect(self, ticket: object) -> StepResult:
        """Waits for the step. Steps are collected in the order in which they were submitted, each once."""
        assert isinstance(ticket, StepResult)
        return ticket

    def logits(self, chunks: list[Chunk]) -> np.ndarray:
        """As `step`, but returns float32 [all positions of all chunks, vocab]: for tests."""
        raise NotImplementedError("this runner has no logits to show")  # serving never asks for them

    @abstractmethod
    def close(self) -> None:
        """Stops threads and unmaps weights."""
