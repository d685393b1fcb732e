"""The daemon as a process: exit codes, messages, and what it leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvmanager.layout import HEADER_WORDS, Header
from kvmanager.pool import examine
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from pagehold.runtime.progress import State, read_progress
from pagehold.runtime.statedir import StateDir
from tests.unit.kvmanager.files import attach_request, ensure_call, key_of, open_call, take_lock

pytestmark = pytest.mark.stack


class Daemon:
    """A process of its own over a folder on a tmpfs."""

    def __init__(self, state: StateDir, *flags: str) -> None:
        self._state = state
        command = [sys.executable, "-m", "services.cli.main", "kvmanager", f"--state-dir={state.root}", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def wait(self) -> tuple[int, str]:
        """Exit code and what it said."""
        said = self.process.communicate(timeout=30)[1]
        return self.process.returncode, said

    def stub(self) -> kv_grpc.KvManagerServiceStub:
        return kv_grpc.KvManagerServiceStub(grpc.insecure_channel(f"unix:{self._state.kvmanager_socket}"))

    def ready(self) -> kv.GetStatsResponse:
        return self.stub().GetStats(kv.GetStatsRequest(), wait_for_ready=True, timeout=20)

    def calls(self, *calls: kv.Call) -> list[kv.Reply]:
        """Attaches, then makes the calls, each in a message of its own."""
        messages = [kv.SessionRequest(calls=[one]) for one in (kv.Call(attach=attach_request(b"1" * 16)), *calls)]
        session = self.stub().Session(iter(messages), wait_for_ready=True, timeout=20)
        return [next(session).replies[0] for _ in messages]


@pytest.fixture
def state() -> Iterator[StateDir]:
    root = Path(tempfile.mkdtemp(prefix="pagehold-test-", dir="/dev/shm"))
    yield StateDir.prepare(root)
    shutil.rmtree(root)


@pytest.fixture
def daemon(state: StateDir) -> Iterator[Daemon]:
    daemon = Daemon(state)
    daemon.ready()
    yield daemon
    daemon.process.kill()
    daemon.wait()


def test_it_stops_when_told_and_leaves_the_files(state: StateDir, daemon: Daemon) -> None:
    take_lock(state, b"1" * 16).release()
    daemon.calls(open_call("a"))
    daemon.process.terminate()
    assert daemon.wait()[0] == 0
    view = read_progress(state.progress("kvmanager"))
    assert view is not None and view.state is State.DOWN
    assert state.tables.exists() and state.pool.exists() and (state.records / f"{key_of('a')}.req").exists()


def test_killed_the_next_one_adopts(state: StateDir, daemon: Daemon) -> None:
    take_lock(state, b"1" * 16).release()
    before = daemon.ready().incarnation
    daemon.calls(open_call("a"))
    daemon.process.kill()
    daemon.wait()
    second = Daemon(state)
    try:
        stats = second.ready()
        assert (stats.records, stats.epoch, stats.executor_attached) == (1, 1, False)
        assert stats.incarnation != before
        view = read_progress(state.progress("kvmanager"))
        assert view is not None and (view.pid, view.state) == (second.process.pid, State.READY)
    finally:
        second.process.kill()
        second.wait()


def test_a_second_manager_is_told_and_harms_nothing(state: StateDir, daemon: Daemon) -> None:
    code, said = Daemon(state).wait()
    assert code == 1 and "another kvmanager serves" in said and "--state-dir" in said
    view = read_progress(state.progress("kvmanager"))
    assert view is not None and (view.pid, view.state) == (daemon.process.pid, State.READY)
    assert not daemon.ready().pages


def test_discard_only_when_nobody_lives(state: StateDir, daemon: Daemon) -> None:
    lock = take_lock(state, b"1" * 16)
    daemon.calls(open_call("a"))
    daemon.process.kill()
    daemon.wait()
    words = np.memmap(state.tables, np.uint64, "r+", shape=(HEADER_WORDS,))
    words[Header.LAYOUT] += 1
    code, said = Daemon(state).wait()
    assert code == 78 and "layout version" in said and "--discard" in said
    code, said = Daemon(state, "--discard").wait()
    assert code == 78 and "an executor still uses" in said
    assert state.tables.exists() and list(state.records.iterdir())
    lock.release()
    second = Daemon(state, "--discard")
    try:
        assert not second.ready().records
        assert not state.tables.exists() and not list(state.records.iterdir())
    finally:
        second.process.kill()
        second.wait()


def test_discard_is_not_for_a_folder_with_a_manager(state: StateDir, daemon: Daemon) -> None:
    take_lock(state, b"1" * 16).release()
    daemon.calls(open_call("a"))
    code, said = Daemon(state, "--discard").wait()
    assert code == 78 and "a kvmanager still uses" in said and "stop it before --discard" in said
    assert daemon.ready().records == 1


def test_idle_it_finds_words_that_changed_by_themselves(state: StateDir, daemon: Daemon) -> None:
    take_lock(state, b"1" * 16).release()
    reply = daemon.calls(open_call("a"), ensure_call("a", 40))[-1]
    pool = examine(state, writable=True)
    assert pool is not None
    pool.tables.row_entry[reply.ensure.row, 0] += 1 << 32
    deadline = time.monotonic() + 30
    while not daemon.ready().integrity_findings:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    view = read_progress(state.progress("kvmanager"))
    assert view is not None and view.findings == daemon.ready().integrity_findings == 1
    daemon.process.terminate()
    assert "run pagehold fsck" in daemon.wait()[1]


def test_what_cannot_be_read_is_said_in_one_line(state: StateDir) -> None:
    code, said = Daemon(state, "--failpoints=kvmanager.attach.after=explode").wait()
    assert code == 78 and said.count("\n") == 1 and "want NAME=kill|stop" in said


@pytest.mark.parametrize("point", ["kvmanager.open.log_written", "kvmanager.open.before_rename"])
def test_killed_half_way_through_an_open(state: StateDir, point: str) -> None:
    take_lock(state, b"1" * 16).release()
    dying = Daemon(state, f"--failpoints={point}=kill")
    with pytest.raises(grpc.RpcError):
        dying.calls(open_call("a"))
    assert dying.wait()[0] == -signal.SIGKILL
    assert os.listdir(state.records)
    second = Daemon(state)
    try:
        assert not second.ready().records and not os.listdir(state.records)
        assert [reply.WhichOneof("reply") for reply in second.calls(open_call("a"))] == ["attach", "open"]
    finally:
        second.process.kill()
        second.wait()
