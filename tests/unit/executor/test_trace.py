"""A line a step: what it says must be what happened, above all who waited for the manager."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.executor import engine as engine_module
from services.executor import trace as trace_module
from services.executor.trace import StepLine, StepTrace, TracedEngine
from tests.unit.executor import world as world_module
from tests.unit.executor.checking_runner import expected
from tests.unit.executor.test_engine import prompt_of
from tests.unit.executor.world import World


class Nanoseconds:
    """`perf_counter_ns` that goes on by a millisecond each time it is read."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter_ns(self) -> int:
        self.now += 1_000_000
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "steps"


@pytest.fixture
def world(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    def make(*parts: object, **options: object) -> engine_module.Engine:
        return TracedEngine(StepTrace(file), *parts, **options)

    monkeypatch.setattr(world_module, "Engine", make)
    monkeypatch.setattr(trace_module, "time", Nanoseconds())
    return World(tmp_path / "state")


def lines(file: Path) -> list[StepLine]:
    return [StepLine.from_json(line) for line in file.read_text().splitlines()]


def test_a_line_comes_back_as_it_was_written() -> None:
    line = StepLine(1, 2, 3, 4, 5, 6)
    assert StepLine.from_json(line.to_json()) == line


def test_every_step_has_its_line(world: World, file: Path) -> None:
    frontend = world.connect()
    for number in (1, 2):
        world.submit(frontend, number, prompt_of(number, 20), 50)
    world.run()
    found = lines(file)
    assert len(found) == world.runner.steps
    assert sum(line.positions for line in found) == world.runner.computed_positions
    assert max(line.sequences for line in found) == 2
    assert all(line.run_us == 2000 <= line.total_us for line in found)
    assert not any(line.waited_us or line.lacking for line in found)


def test_waiting_for_the_manager_with_sequences_to_run_is_told(world: World, file: Path) -> None:
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 200)
    while not frontend.stream(1).tokens:
        world.turn()
    world.away = True
    while world.turn():
        pass
    idle = 5
    for _ in range(idle):
        world.turn()
    world.answer()
    world.run()
    assert frontend.stream(1).tokens[0] == expected(prompt_of(1, 20), 200)
    waited = [line for line in lines(file) if line.waited_us]
    assert len(waited) == 1
    # Two readings of the clock a turn, from the end of the first that found no page to the step's start.
    assert waited[0].waited_us == (2 * idle + 1) * 1000 < waited[0].total_us


def test_those_left_out_while_others_run_are_counted(world: World, file: Path) -> None:
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 200)
    while len(frontend.stream(1).tokens.get(0, [])) < 20:
        world.turn()
    world.submit(frontend, 2, prompt_of(2, 20), 200)
    while not frontend.stream(2).tokens:
        world.turn()
    world.away = True
    while world.turn():
        pass
    world.answer()
    world.run()
    found = lines(file)
    assert {line.sequences for line in found if line.lacking == 1} == {1}


def test_a_rest_is_nobodys_time(world: World, file: Path) -> None:
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 5)
    world.run()
    for _ in range(1000):
        world.turn()
    world.submit(frontend, 2, prompt_of(2, 20), 5)
    world.run()
    assert max(line.total_us for line in lines(file)) < 100_000


def test_lines_are_written_when_there_are_many(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "_MOST_BUFFERED", 3)
    trace = StepTrace(file)
    for number in range(2):
        trace.add(StepLine(number, 0, 0, 0, 0, 0))
    assert not lines(file)
    trace.add(StepLine(2, 0, 0, 0, 0, 0))
    assert [line.total_us for line in lines(file)] == [0, 1, 2]


def test_a_full_disk_ends_the_trace_and_nothing_else() -> None:
    trace = StepTrace(Path("/dev/full"))
    for _ in range(2):
        trace.add(StepLine(1, 1, 0, 0, 1, 1))
        trace.flush()
