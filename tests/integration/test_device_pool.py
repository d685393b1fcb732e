"""A pool in device memory between real processes that are killed, over a stand-in for CUDA's memory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kvmanager.layout import PoolKind
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from pagehold.runtime.statedir import StateDir
from tests.device.scripted_executor import Attachment, Lost, ScriptedExecutor
from tests.unit.kvmanager.files import ensure_call, executor_log, open_call

pytestmark = pytest.mark.stack

DATA = bytes(range(256)) * 64


class Stack:
    """One state folder, its manager, and executors one after the other."""

    def __init__(self, root: Path) -> None:
        self.state = StateDir.prepare(root)
        self.executors: list[ScriptedExecutor] = []
        self._started = 0
        self.start_manager()

    def start_manager(self) -> None:
        command = [sys.executable, "-m", "services.cli.main", "kvmanager", f"--state-dir={self.state.root}"]
        self.manager = subprocess.Popen([*command, "--cuda-driver=tests.device.fake_memory"])

    def kill_manager(self) -> None:
        self.manager.kill()
        self.manager.wait()

    def executor(self, kind: PoolKind) -> ScriptedExecutor:
        self._started += 1
        self.executors.append(ScriptedExecutor(self.state.root, kind, self._started))
        return self.executors[-1]

    def kill_executor(self) -> None:
        self.executors.pop().kill()

    def stats(self) -> kv.GetStatsResponse:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"unix:{self.state.kvmanager_socket}", options) as channel:
            stub = kv_grpc.KvManagerServiceStub(channel)
            return stub.GetStats(kv.GetStatsRequest(), wait_for_ready=True, timeout=20)

    def descriptors(self) -> list[str]:
        """What the manager has open."""
        folder = Path(f"/proc/{self.manager.pid}/fd")
        found = []
        for name in os.listdir(folder):
            try:
                found.append(os.readlink(folder / name))
            except OSError:
                continue  # closed meanwhile
        return found


@pytest.fixture
def stack() -> Iterator[Stack]:
    root = Path(tempfile.mkdtemp(prefix="pagehold-test-", dir="/dev/shm"))
    stack = Stack(root)
    yield stack
    for executor in stack.executors:
        executor.kill()
    stack.kill_manager()
    shutil.rmtree(root)


def with_a_row(stack: Stack, executor: ScriptedExecutor) -> None:
    """A request whose 40 known tokens are computed, and bytes in its pages."""
    assert executor.call(open_call("a")).HasField("open")
    assert executor.call(ensure_call("a", 40)).ensure.capacity == 48
    executor_log(stack.state.records, "a")[0].set_progress(40, 40)
    executor.write(DATA)


def check_nothing_is_left(stack: Stack, kind: PoolKind, before: Attachment) -> None:
    """Both killed: the pool is new, and the tokens are there."""
    stack.kill_manager()
    stack.kill_executor()
    stack.start_manager()
    executor = stack.executor(kind)
    after = executor.attachment()
    assert after == Attachment(before.epoch + 1, True, after.pool_uuid, before.generation + 1, opened=True)
    assert after.pool_uuid != before.pool_uuid
    assert executor.read(len(DATA)) == bytes(len(DATA))
    assert (stack.stats().rows, stack.stats().records) == (0, 1)
    assert executor_log(stack.state.records, "a")[0].known == 40


def test_a_manager_that_is_killed_takes_an_ipc_pool_with_it_and_no_token(stack: Stack) -> None:
    executor = stack.executor(PoolKind.IPC)
    before = executor.attachment()
    with_a_row(stack, executor)
    stack.kill_manager()
    assert executor.read(len(DATA)) == DATA  # its mapping is still good: the step in flight can end
    stack.start_manager()
    assert isinstance(executor.said(), Lost)
    after = executor.attachment()
    assert after == Attachment(1, True, after.pool_uuid, before.generation + 1, opened=True)
    assert after.pool_uuid != before.pool_uuid
    stats = stack.stats()
    assert (stats.rows, stats.records, stats.cached_pages) == (0, 1, 0)
    assert executor.read(len(DATA)) == bytes(len(DATA))
    log = executor_log(stack.state.records, "a")[0]
    assert (log.computed, log.known) == (0, 40)
    assert executor.call(ensure_call("a", 40)).ensure.capacity == 48
    check_nothing_is_left(stack, PoolKind.IPC, after)


def test_a_manager_that_is_killed_gets_a_vmm_pool_back(stack: Stack) -> None:
    executor = stack.executor(PoolKind.VMM)
    before = executor.attachment()
    with_a_row(stack, executor)
    stack.kill_manager()
    stack.start_manager()
    assert executor.attachment() == Attachment(1, False, before.pool_uuid, 1, opened=False)
    assert executor.read(len(DATA)) == DATA and stack.stats().rows == 1
    stack.kill_executor()
    second = stack.executor(PoolKind.VMM)
    found = second.attachment()
    assert found == Attachment(2, False, before.pool_uuid, 1, opened=True)
    assert second.read(len(DATA)) == DATA
    check_nothing_is_left(stack, PoolKind.VMM, found)


def test_an_attach_waits_for_the_death_of_the_former_executor(stack: Stack) -> None:
    first = stack.executor(PoolKind.IPC)
    first.attachment()
    first.unlock()
    first.stop(signal.SIGSTOP)
    second = stack.executor(PoolKind.IPC)
    assert second.said(0.5) is None
    assert stack.stats().epoch == 1  # only that attach waits
    first.kill()
    stack.executors.remove(first)
    assert second.attachment().epoch == 2


@pytest.mark.parametrize("kind", [PoolKind.IPC, PoolKind.VMM])
def test_fifty_lives_keep_every_byte_and_row_and_leave_nothing_behind(stack: Stack, kind: PoolKind) -> None:
    first = stack.executor(kind)
    before = first.attachment()
    assert before == Attachment(1, True, before.pool_uuid, 1, opened=True)
    with_a_row(stack, first)
    counts = []
    for epoch in range(2, 51):
        stack.kill_executor()
        executor = stack.executor(kind)
        assert executor.attachment() == Attachment(epoch, False, before.pool_uuid, 1, opened=True)
        assert executor.read(len(DATA)) == DATA
        counts.append(len(stack.descriptors()))
    assert stack.stats().rows == 1 and not stack.state.pool.exists()
    assert max(counts[25:]) <= max(counts[:25])
    found = stack.descriptors()
    assert sum("pagehold-fake-gpu" in name for name in found) == 1
    assert sum("pidfd" in name for name in found) == 1
