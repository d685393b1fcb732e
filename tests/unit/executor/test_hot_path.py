"""What a step costs besides the model: one thread feeds the device, so Python's share is lost to it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pagehold.executor.v1 import executor_pb2 as ex
from services.executor.inbox import Connected
from services.executor.runner.base import Chunk, DraftLimits, StepResult
from tests.unit.executor import world as world_module
from tests.unit.executor.checking_runner import CheckingRunner
from tests.unit.executor.world import Frontend, World

SEQUENCES = 64
MOST_CALLS = 30.0  # Python and C functions for each sequence: what a step's time is made of, without its noise


class NoModel(CheckingRunner):
    def step(self, chunks: list[Chunk]) -> StepResult:
        return StepResult(np.full(len(chunks), 1234, np.uint32), np.zeros(len(chunks), np.float32))


class Sink(Frontend):
    def offer(self, message: ex.ConnectResponse) -> None:
        self.last = len(message.tokens.token_ids)


@pytest.mark.parametrize(("rows", "granted"), [(0, 0), (64, 0), (2048, 0), (0, 2048)])
def test_a_step_calls_few_functions_for_each_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, granted: int
) -> None:
    """Of a runner that drafts: too few for drafts behind so many, and enough for some behind all."""
    monkeypatch.setattr(world_module, "CheckingRunner", NoModel)
    drafts = DraftLimits(15, rows, granted) if rows or granted else None
    world = World(tmp_path / "state", SEQUENCES * 24, drafts=drafts, max_num_seqs=SEQUENCES, max_batch_tokens=2048)
    sink = Sink()
    world.inbox.put(Connected(sink))
    for number in range(SEQUENCES):
        world.submit(sink, number, [100 + number] * 8, 300)
    while len(world.engine.scheduler.running) < SEQUENCES:
        world.turn()
    calls: list[int] = []

    def count(frame: object, event: str, argument: object) -> None:
        calls[-1] += event in ("call", "c_call")

    for _ in range(50):
        events = world.inbox.take(0)
        calls.append(0)
        sys.setprofile(count)
        try:
            world.engine.handle(events)
            world.engine.step()
        finally:
            sys.setprofile(None)
        assert sink.last == SEQUENCES
    # The manager sits in this thread, so steps that ask for pages are costlier here than they are in the product.
    each = float(np.median(calls)) / SEQUENCES
    print(f"{each:.1f} calls for each sequence in a step")
    assert each < MOST_CALLS
