"""The default model in bfloat16: what a sequence gets depends on its own tokens and sampling alone, bit for bit.

Not on who else is in a step, how its prompt is cut, where its context is split, the number of threads, the size and
order of pages, or on which process computed them. `tests/kernels/test_bit_exact.py` shows the same of small models
on every instruction set.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

from kvmanager.layout import F32
from services.executor.modelstore.packed import PackedModel
from services.executor.runner.base import Chunk, Lane, SamplingParams
from services.executor.runner.cpu import CpuRunner
from tests.models.paging import TestPool, chunks_of

LENGTH = 150  # of the text whose logits are compared: more than two tiles of attention
STEPS = 16  # tokens that each case samples
PAGES = 400
MOST_MATES = 63

Start = Callable[[int], CpuRunner]  # threads -> runner


@contextmanager
def closing_runners(model: PackedModel) -> Iterator[Start]:
    runners: list[CpuRunner] = []

    def make(threads: int) -> CpuRunner:
        runners.append(CpuRunner(model, "bfloat16", "bfloat16", threads))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


@pytest.fixture
def start(smollm2: PackedModel) -> Iterator[Start]:
    with closing_runners(smollm2) as make:
        yield make


def tokens_of(seed: int, length: int, vocabulary: int) -> list[int]:
    return np.random.default_rng(seed).integers(17, vocabulary, length).tolist()


class Mates:
    """Others in every step, each somewhere in a text of its own: some decode, some are in their prompts."""

    def __init__(self, runner: CpuRunner, pool: TestPool, model: PackedModel, count: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._lanes: list[Lane] = []
        for number in range(count):
            length = self._random.randint(1, 24)
            text = tokens_of(1000 + number, length, model.spec.vocab_size)
            self._lanes.append(pool.lane(text, length, SamplingParams(seed=number, logprobs=bool(number % 2))))
        if count:
            runner.step([chunk for lane in self._lanes for chunk in chunks_of(lane, lane.prompt_length, None)])

    def around(self, chunks: list[Chunk]) -> tuple[list[Chunk], list[int]]:
        """The chunks of a step with these among them, and where these are. K/V of others is written again as it was."""
        batch = [(chunk, number) for number, chunk in enumerate(chunks)]
        for lane in self._lanes:
            first = self._random.randrange(lane.prompt_length)
            count = 1 if self._random.random() < 0.6 else self._random.randint(1, lane.prompt_length - first)
            batch.append((Chunk(lane, first, count, first, first + count == lane.prompt_length), -1))
        self._random.shuffle(batch)
        places = {number: place for place, (_, number) in enumerate(batch)}
        return [chunk for chunk, _ in batch], [places[number] for number in range(len(chunks))]


# --- logits ---


class Way(NamedTuple):
    """To compute the text."""

    threads: int
    chunk: int | None  # tokens at a time; None: all
    mates: int = 0
    page_size: int = 16


@pytest.fixture(scope="module")
def alone(smollm2: PackedModel) -> F32:
    """float32 [LENGTH, vocabulary]: the whole text at once, on one thread, with nobody else there."""
    with closing_runners(smollm2) as start:
        runner = start(1)
        text = tokens_of(0, LENGTH, smollm2.spec.vocab_size)
        lane = TestPool(smollm2.spec, runner, "bfloat16", PAGES).lane(text, LENGTH)
        logits = runner.logits(chunks_of(lane, LENGTH, None))
    assert np.isfinite(logits).all() and logits.std() > 0.5
    return logits


def check(found: F32, alone: F32, first: int) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), alone[first : first + len(found)].view(np.uint32))


def rows_of(batch: list[Chunk], place: int) -> slice:
    """Where the logits of one chunk lie among those of its step."""
    first = sum(chunk.count for chunk in batch[:place])
    return slice(first, first + batch[place].count)


@pytest.mark.parametrize(
    "way",
    [
        Way(threads=2, chunk=1),
        Way(threads=3, chunk=7, mates=2),
        Way(threads=1, chunk=16, mates=5, page_size=8),
        Way(threads=2, chunk=64, mates=MOST_MATES),
        Way(threads=3, chunk=None, mates=31, page_size=64),
    ],
    ids=str,
)
def test_logits(start: Start, smollm2: PackedModel, alone: F32, way: Way) -> None:
    runner = start(way.threads)
    pool = TestPool(smollm2.spec, runner, "bfloat16", PAGES, way.page_size)
    mates = Mates(runner, pool, smollm2, way.mates, seed=way.mates)
    lane = pool.lane(tokens_of(0, LENGTH, smollm2.spec.vocab_size), LENGTH)
    for chunk in chunks_of(lane, LENGTH, way.chunk):
        batch, (place,) = mates.around([chunk])
        check(runner.logits(batch)[rows_of(batch, place)], alone, chunk.start)


def test_logits_wherever_the_context_is_split(start: Start, smollm2: PackedModel, alone: F32) -> None:
    """What lies before was computed by other processes, in pieces of any size, and is only read here."""
    chance = random.Random(1)
    for threads in (1, 2, 3):
        borders = sorted({0, *chance.sample(range(1, LENGTH), 5), LENGTH})
        runner = start(threads)
        pool = TestPool(smollm2.spec, runner, "bfloat16", PAGES)
        lane = pool.lane(tokens_of(0, LENGTH, smollm2.spec.vocab_size), LENGTH)
        for first, end in pairwise(borders):
            check(runner.logits([Chunk(lane, first, end - first, first, False)]), alone, first)
            runner = start(chance.choice((1, 2, 3)))
            pool.map_into(runner)
            runner.prepare(lane, LENGTH)


# --- sampling ---


class Case(NamedTuple):
    prompt: int  # tokens
    index: int  # of the output
    sampling: SamplingParams


_SEEDED = SamplingParams(seed=5, temperature=0.9, logprobs=True)
_GREEDY = replace(_SEEDED, temperature=0.0)
_BIAS = tuple((token, 4.0 if token % 2 else -100.0) for token in range(300, 340))
CASES = {
    "greedy": Case(20, 0, _GREEDY),
    "seeded": Case(21, 3, _SEEDED),
    "hot": Case(1, 0, replace(_SEEDED, temperature=1.7, seed=2**64 - 1)),
    "top-k": Case(33, 0, replace(_SEEDED, top_k=40)),
    "top-p": Case(16, 1, replace(_SEEDED, top_p=0.8)),
    "min-p": Case(17, 0, replace(_SEEDED, min_p=0.05)),
    "repetition": Case(40, 0, replace(_GREEDY, repetition_penalty=1.3)),
    "presence": Case(12, 2, replace(_SEEDED, presence_penalty=0.7)),
    "frequency": Case(9, 0, replace(_GREEDY, frequency_penalty=0.9)),
    "bias": Case(30, 0, replace(_SEEDED, logit_bias=_BIAS)),
    "suppressed": Case(15, 0, replace(_GREEDY, suppressed=(0, 1, 2), min_tokens=STEPS)),
    "everything": Case(
        50,
        7,
        replace(
            _SEEDED,
            top_k=200,
            top_p=0.95,
            min_p=0.01,
            repetition_penalty=1.1,
            presence_penalty=0.3,
            frequency_penalty=0.3,
            logit_bias=_BIAS,
        ),
    ),
}


class Output(NamedTuple):
    tokens: list[int]
    logprobs: list[int]  # the bits of each


class Life(NamedTuple):
    """Of a process that runs them."""

    threads: int
    steps: int = 1 << 30  # until it dies


class Running:
    """One case on its way."""

    def __init__(self, case: Case, pool: TestPool, vocabulary: int) -> None:
        text = tokens_of(case.prompt, case.prompt, vocabulary)
        self.lane = pool.lane(text, case.prompt + STEPS, case.sampling)
        self.lane.index = case.index
        self.known = case.prompt
        self._computed = 0
        self._logprobs = np.zeros(STEPS, np.float32)

    @property
    def over(self) -> bool:
        return self.known == len(self.lane.tokens)

    def next(self, size: int | None) -> Chunk:
        count = min(self.known - self._computed, size or self.known)
        return Chunk(self.lane, self._computed, count, self._computed, self._computed + count == self.known)

    def take(self, chunk: Chunk, token: int, logprob: np.float32) -> None:
        self._computed += chunk.count
        if chunk.sample:
            self.lane.tokens[self.known] = token
            self._logprobs[self.known - self.lane.prompt_length] = logprob
            self.known += 1

    @property
    def output(self) -> Output:
        tokens = self.lane.tokens[self.lane.prompt_length :].tolist()
        return Output(tokens, self._logprobs.view(np.uint32).tolist())


def sample(
    start: Start, model: PackedModel, cases: list[Case], lives: list[Life], chunk: int | None = None, mates: int = 0
) -> list[Output]:
    """STEPS tokens of each case, all in one batch: by one process, or by several on the same pages."""
    runner = start(lives[0].threads)
    pool = TestPool(model.spec, runner, "bfloat16", PAGES)
    running = [Running(case, pool, model.spec.vocab_size) for case in cases]
    for number, life in enumerate(lives):
        if number:
            runner = start(life.threads)
            pool.map_into(runner)
        for one in running:
            runner.prepare(one.lane, one.known)
        others = Mates(runner, pool, model, mates, seed=number)
        for _ in range(life.steps):
            todo = [one for one in running if not one.over]
            if not todo:
                break
            batch, places = others.around([one.next(chunk) for one in todo])
            result = runner.step(batch)
            for one, place in zip(todo, places, strict=True):
                one.take(batch[place], int(result.tokens[place]), result.logprobs[place])
    return [one.output for one in running]


@pytest.fixture(scope="module")
def expected(smollm2: PackedModel) -> Iterator[list[Output]]:
    """Each case alone, its prompt at once, on one thread."""
    with closing_runners(smollm2) as start:
        yield [sample(start, smollm2, [case], [Life(threads=1)])[0] for case in CASES.values()]


@pytest.mark.parametrize(
    ("lives", "chunk", "mates"),
    [
        pytest.param([Life(2)], None, 0, id="together"),
        pytest.param([Life(3)], 7, 12, id="with-mates-in-chunks"),
        pytest.param([Life(2, 5), Life(1, 3), Life(3, 10), Life(2)], 16, 3, id="by-four-processes"),
    ],
)
def test_tokens_and_logprobs(
    start: Start, smollm2: PackedModel, expected: list[Output], lives: list[Life], chunk: int | None, mates: int
) -> None:
    for name, found, wanted in zip(
        CASES, sample(start, smollm2, list(CASES.values()), lives, chunk, mates), expected, strict=True
    ):
        assert found == wanted, name
    assert len({tuple(output.tokens) for output in expected}) == len(CASES)
    assert all(np.array(output.logprobs, np.uint32).view(np.float32).max() <= 0 for output in expected)
