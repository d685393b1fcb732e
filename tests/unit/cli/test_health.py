"""`pagehold health`: what a container's check is told."""

from __future__ import annotations

import pytest

from pagehold.runtime.progress import Progress, State
from pagehold.runtime.statedir import StateDir
from tests.unit.cli.command import Command


def test_what_never_ran_is_down(pagehold: Command, state: StateDir) -> None:
    assert pagehold("health", "executor", "--state-dir", state.root) == 1
    assert pagehold.out == "executor: down\n"


@pytest.mark.parametrize(
    ("found", "code"), [(State.READY, 0), (State.STANDBY, 0), (State.STARTING, 1), (State.DRAINING, 1), (State.DOWN, 1)]
)
def test_only_who_works_or_could_at_once_is_healthy(
    pagehold: Command, state: StateDir, found: State, code: int
) -> None:
    Progress(state.progress("executor")).set_state(found)
    assert pagehold("health", "executor", "--state-dir", state.root) == code
    assert pagehold.out == f"executor: {found.label}\n"


def test_a_missed_deadline_is_seen(pagehold: Command, state: StateDir) -> None:
    progress = Progress(state.progress("kvmanager"))
    progress.set_state(State.READY)
    progress.begin_turn(-1)
    assert pagehold("health", "kvmanager", "--state-dir", state.root) == 1
    assert pagehold.out == "kvmanager: stalled\n"


def test_a_successor_under_another_name_will_do(pagehold: Command, state: StateDir) -> None:
    Progress(state.progress("frontend")).set_state(State.DOWN)
    Progress(state.progress("frontend-2")).set_state(State.READY)
    assert pagehold("health", "frontend", "--state-dir", state.root) == 0
    assert pagehold("health", "executor", "--state-dir", state.root) == 1
