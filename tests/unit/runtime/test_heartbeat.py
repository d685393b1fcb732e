"""A process that is stopped is found, whatever its turn may take."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pagehold.runtime.heartbeat import Heartbeat
from pagehold.runtime.progress import Progress, ProgressView, read_progress

HANG_SECONDS = 0.4
PROGRAM = """
import sys, time
from pathlib import Path
from pagehold.runtime.heartbeat import Heartbeat
from pagehold.runtime.progress import Progress
progress = Progress(Path(sys.argv[1]))
Heartbeat(progress, float(sys.argv[2]))
progress.begin_turn(1000)
time.sleep(1000)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "executor.progress"


@pytest.fixture
def process(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """In a turn that may take long."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(path), str(HANG_SECONDS)]) as running:
        yield running
        running.kill()


def until(path: Path, holds: Callable[[ProgressView], bool]) -> ProgressView:
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        view = read_progress(path)
        if view is not None and holds(view):
            return view
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def test_a_stopped_process_misses_its_heartbeat(path: Path, process: subprocess.Popen[bytes]) -> None:
    first = until(path, lambda view: view.deadline_ns > 0)
    until(path, lambda view: view.alive_until_ns > first.alive_until_ns)
    os.kill(process.pid, signal.SIGSTOP)
    view = until(path, lambda view: view.overdue)
    assert view.missed_ns == view.alive_until_ns and view.deadline_ns == first.deadline_ns
    os.kill(process.pid, signal.SIGCONT)
    until(path, lambda view: not view.overdue)


def test_what_has_ended_writes_no_more(path: Path) -> None:
    heart = Heartbeat(Progress(path), 0.04)
    first = until(path, lambda view: True).alive_until_ns
    until(path, lambda view: view.alive_until_ns > first)
    heart.end()
    Progress(path)
    time.sleep(0.1)
    view = read_progress(path)
    assert view is not None and view.alive_until_ns == 0 and not view.overdue
