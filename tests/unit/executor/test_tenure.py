"""Who is the executor, and who waits for its death."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pagehold.runtime.lock import FileLock, LockBusy, read_id
from pagehold.runtime.progress import State, read_progress
from pagehold.runtime.statedir import StateDir
from services.executor.tenure import Tenure

EXECUTOR = """
import sys, time
from pathlib import Path
from pagehold.runtime.progress import State
from pagehold.runtime.statedir import StateDir
from services.executor.tenure import Tenure
tenure = Tenure(StateDir.prepare(Path(sys.argv[1])))
assert tenure.is_held
tenure.progress.set_state(State.READY)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return StateDir.prepare(tmp_path / "state")


def start_executor(state: StateDir) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", EXECUTOR, str(state.root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_first_is_the_executor_at_once(state: StateDir) -> None:
    tenure = Tenure(state)
    assert tenure.is_held and len(tenure.id) == 16 and read_id(state.executor_lock) == tenure.id
    view = read_progress(state.progress("executor"))
    assert view is not None and (view.pid, view.state) == (os.getpid(), State.STARTING)
    assert read_progress(state.progress("executor-standby")) is None


async def test_a_standby_leaves_the_executors_words_alone_until_it_is_dead(state: StateDir) -> None:
    process = start_executor(state)
    before = read_id(state.executor_lock)
    standby = Tenure(state)
    waiting = asyncio.create_task(standby.wait())
    await asyncio.sleep(0.1)
    view, own = read_progress(state.progress("executor")), read_progress(state.progress("executor-standby"))
    assert view is not None and (view.pid, view.state) == (process.pid, State.READY)
    assert own is not None and (own.pid, own.state) == (os.getpid(), State.STANDBY)
    assert not standby.is_held and read_id(state.executor_lock) == before
    process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    await asyncio.wait_for(waiting, 5)
    assert time.monotonic() - killed < 2
    process.wait()
    view, own = read_progress(state.progress("executor")), read_progress(state.progress("executor-standby"))
    assert view is not None and (view.pid, view.state) == (os.getpid(), State.STARTING)
    assert own is not None and own.state is State.DOWN
    assert standby.is_held and read_id(state.executor_lock) == standby.id != before
    with pytest.raises(LockBusy):
        FileLock(state.executor_lock).acquire()


async def test_waiting_can_be_given_up(state: StateDir) -> None:
    process = start_executor(state)
    waiting = asyncio.create_task(Tenure(state).wait())
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    process.kill()
    process.wait()
    await asyncio.sleep(0.05)  # the thread gets the lock after all; nobody is told, and nothing is raised
