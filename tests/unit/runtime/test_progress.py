"""What a supervisor reads of a component."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pagehold.runtime.process import is_alive, is_elsewhere
from pagehold.runtime.progress import Progress, State, pid_namespace, read_progress


def test_a_life(tmp_path: Path) -> None:
    path = tmp_path / "executor.progress"
    assert read_progress(path) is None
    progress = Progress(path)
    view = read_progress(path)
    assert view is not None and (view.pid, view.state, view.turn) == (os.getpid(), State.STARTING, 0)
    assert 0 < view.started_ns <= time.monotonic_ns()
    progress.set_state(State.READY)
    progress.begin_turn(60)
    view = read_progress(path)
    assert view is not None and view.state is State.READY and view.deadline_ns > time.monotonic_ns()
    assert not view.overdue
    progress.end_turn(3)
    progress.end_turn()
    view = read_progress(path)
    assert view is not None and (view.turn, view.deadline_ns, view.committed) == (2, 0, 3)


def test_a_missed_deadline_is_overdue_and_silence_is_not(tmp_path: Path) -> None:
    path = tmp_path / "executor.progress"
    progress = Progress(path)
    view = read_progress(path)
    assert view is not None and not view.overdue
    progress.begin_turn(0.001)
    time.sleep(0.01)
    view = read_progress(path)
    assert view is not None and view.overdue


def test_the_next_process_starts_from_zero(tmp_path: Path) -> None:
    path = tmp_path / "executor.progress"
    first = Progress(path)
    first.begin_turn(1)
    first.end_turn(9)
    first.begin_turn(0)
    Progress(path)
    view = read_progress(path)
    assert view is not None and (view.turn, view.deadline_ns, view.committed) == (0, 0, 0)


def test_starts_are_counted_over_processes_and_releases(tmp_path: Path) -> None:
    path = tmp_path / "executor.progress"
    Progress(path)
    Progress(path)
    view = read_progress(path)
    assert view is not None and view.starts == 2
    with path.open("r+b") as file:
        file.truncate(9 * 8)  # of a release that did not count
    view = read_progress(path)
    assert view is not None and view.pid == os.getpid() and view.starts == 0
    Progress(path)
    view = read_progress(path)
    assert view is not None and view.starts == 1


def test_a_look_needs_no_numpy() -> None:
    code = "import sys, pagehold.runtime.process; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("words", [[], [1, 2], [1, 77, 0, 0, 0, 0, 0, 0]])
def test_a_damaged_file_says_nothing(tmp_path: Path, words: list[int]) -> None:
    path = tmp_path / "executor.progress"
    np.array(words, np.uint64).tofile(path)
    assert read_progress(path) is None


def test_a_release_without_namespaces_is_read(tmp_path: Path) -> None:
    path = tmp_path / "executor.progress"
    Progress(path)
    with path.open("r+b") as file:
        file.truncate(8 * 8)
    view = read_progress(path)
    assert view is not None and view.pid == os.getpid() and is_alive(view) and not is_elsewhere(view)


def test_another_containers_process_lives_as_long_as_it_keeps_its_deadlines(tmp_path: Path) -> None:
    path = tmp_path / "executor.progress"
    progress = Progress(path)
    own = read_progress(path)
    assert own is not None and own.pid_namespace == pid_namespace() and is_alive(own)
    # Its pid may be anybody's here, and is nobody's in this case.
    progress.begin_turn(60)
    view = read_progress(path)
    assert view is not None
    elsewhere = replace(view, pid=1 << 30, pid_namespace=view.pid_namespace + 1)
    assert is_elsewhere(elsewhere) and is_alive(elsewhere)
    assert not is_alive(replace(elsewhere, state=State.DOWN))
    assert not is_alive(replace(elsewhere, deadline_ns=1))
    # This pid is somebody's here, but not that process's.
    assert not is_alive(replace(elsewhere, pid=os.getpid(), deadline_ns=1))
