"""Ten minutes of ten times the load that pool and steps can take, by a clock that the test moves.

Mixed priorities, several outputs, deadlines and cancels. Whoever was accepted comes to an end, whatever was
held is given back, and nobody loses a row twice without having committed a token in between.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.kv.v1 import kv_manager_pb2 as kv
from services.executor import frontends
from services.executor.pages import Pages
from services.executor.sequence import Sequence
from tests.unit.executor.checking_runner import expected
from tests.unit.executor.test_engine import prompt_of
from tests.unit.executor.world import Clock, Frontend, World

STEP_SECONDS = 0.1
MINUTES = 10
MOST_LIVE = 60


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    tokens: int
    outputs: int


class Load:
    """Requests at a steady rate, some of which are cancelled, most with a deadline."""

    def __init__(self, world: World, frontend: Frontend) -> None:
        self.world = world
        self.frontend = frontend
        self.asked: dict[int, Asked] = {}
        self._rng = random.Random(11)
        self._due = 0.0

    def arrive(self, seconds: float, rate: float) -> None:
        """rate: requests in a second."""
        self._due += seconds * rate
        while self._due >= 1:
            self._due -= 1
            self._submit(len(self.asked) + 1)
            if self._rng.random() < 0.1:
                name = f"r{self._rng.randint(1, len(self.asked))}"
                self.world.send(self.frontend, cancel=ex.Cancel(tenant="default", request_id=name))

    def _submit(self, number: int) -> None:
        rng = self._rng
        # Some prompts begin alike, so that rows share pages and slots are copied.
        prompt = prompt_of(rng.randint(-8, -1), rng.randint(0, 30)) + prompt_of(number, rng.randint(4, 20))
        asked = self.asked[number] = Asked(prompt, rng.randint(20, 110), rng.choice([1, 1, 1, 2, 3]))
        priority = rng.choice([-1, 0, 0, 0, 1])
        self.world.submit(self.frontend, number, prompt, asked.tokens, n=asked.outputs, priority=priority)
        if rng.random() < 0.9:
            submit = self.world.inbox._events[-1].message.submit  # type: ignore[union-attr]
            submit.timeout_ms = rng.randint(5_000, 60_000)

    def check(self) -> tuple[int, int, int]:
        """How many ended in full, how many earlier, how many were refused."""
        full = early = refused = 0
        for number, asked in self.asked.items():
            heard = self.frontend.stream(number)
            if not heard.accepted:
                assert heard.failures == [ex.FAILURE_OVERLOADED], f"{number}: {heard.failures}"
                refused += 1
            elif heard.failures:
                assert heard.failures == [ex.FAILURE_DEADLINE], f"{number}: {heard.failures}"
                early += 1
            else:
                assert len(heard.ended) == asked.outputs, f"{number} has not ended"
                lengths = [self._check_output(number, index) for index in range(asked.outputs)]
                full += lengths == [asked.tokens] * asked.outputs
                early += lengths != [asked.tokens] * asked.outputs
        return full, early, refused

    def _check_output(self, number: int, index: int) -> int:
        asked, heard = self.asked[number], self.frontend.stream(number)
        tokens = heard.tokens.get(index, [])
        assert tokens == expected(asked.prompt, len(tokens), index=index), f"output {index} of {number}"
        assert heard.ended[index].length == len(tokens)
        return len(tokens)


@pytest.fixture
def lost_at(monkeypatch: pytest.MonkeyPatch) -> dict[Sequence, int]:
    """What each sequence that lost its row knew then, the last time; it must know more the next time."""
    lost: dict[Sequence, int] = {}
    real = Pages.preempt

    def preempt(self: Pages, sequence: Sequence) -> kv.Call:
        assert sequence.known > lost.get(sequence, -1), "it lost its row twice, and committed nothing in between"
        lost[sequence] = sequence.known
        return real(self, sequence)

    monkeypatch.setattr(Pages, "preempt", preempt)
    return lost


def test_ten_times_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost_at: dict[Sequence, int]) -> None:
    monkeypatch.setattr(frontends, "_MOST_LIVE", MOST_LIVE)
    clock = Clock()
    world = World(tmp_path / "state", pages=18, clock=clock, record_ttl=30.0, max_num_seqs=8, max_batch_tokens=32)
    load = Load(world, world.connect())

    def turn() -> None:
        clock.now += STEP_SECONDS
        world.turn()

    # What can be served: for a while there are always some to be taken.
    for _ in range(400):
        load.arrive(STEP_SECONDS, 4.0 if len(world.engine.scheduler.waiting) < 6 else 0.0)
        turn()
    served = sum(len(load.frontend.stream(number).ended) > 0 for number in load.asked)
    rate = 10 * served / (400 * STEP_SECONDS)
    steps = int(MINUTES * 60 / STEP_SECONDS)
    for _ in range(steps):
        load.arrive(STEP_SECONDS, rate)
        turn()
    queued = len(world.requests.live)
    drain = 0
    while world.requests.live or len(world.requests.openings):
        turn()
        drain += 1
        assert drain < 5000, "it does not come to an end"
    for _ in range(5):
        turn()
    full, early, refused = load.check()
    preemptions = world.page_calls.preemptions
    print(
        f"{len(load.asked)} requests, {rate:.1f} a second: {full} in full, {early} ended early, {refused} refused; "
        f"{preemptions} preemptions of {len(lost_at)} sequences; {world.runner.copied_slots} slots copied; "
        f"{world.runner.steps} steps, {drain} turns to drain {queued} requests"
    )
    core = world.manager.core
    assert core is not None and core.check_integrity() == []
    assert not core.live_rows and core.pages.available == core.pages.usable
    assert not world.engine.scheduler.waiting and not world.engine.scheduler.running
    assert full > 50 and refused > 200 and preemptions > 50
