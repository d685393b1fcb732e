"""The executor as a process: it stops when told, whatever it waits for, and its exit code says what to do."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.executor.v1 import executor_pb2_grpc as ex_grpc
from pagehold.runtime.lock import FileLock
from pagehold.runtime.progress import Progress, State, read_progress
from pagehold.runtime.statedir import StateDir
from pagehold.v1 import inference_pb2 as api

pytestmark = pytest.mark.stack


class Processes:
    """Components over one state folder; all are gone at the end of the test."""

    def __init__(self, state: StateDir) -> None:
        self.state = state
        self.started: list[subprocess.Popen[str]] = []

    def start(self, component: str, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "services.cli.main", component, f"--state-dir={self.state.root}", *flags]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.started.append(process)
        return process

    def executor(self, *flags: str) -> subprocess.Popen[str]:
        return self.start("executor", "--kv-memory=64MiB", "--threads=1", *flags)

    def until(self, name: str, state: State, pid: int, seconds: float = 60) -> None:
        """Waits for what a progress file says."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            view = read_progress(self.state.progress(name))
            if view is not None and (view.pid, view.state) == (pid, state):
                return
            time.sleep(0.02)
        raise AssertionError(f"{name} is {read_progress(self.state.progress(name))}")


def ended(process: subprocess.Popen[str], seconds: float = 30) -> tuple[int, str]:
    """Exit code and what it said."""
    said = process.communicate(timeout=seconds)[1]
    return process.returncode, said


@pytest.fixture
def run() -> Iterator[Processes]:
    root = Path(tempfile.mkdtemp(prefix="pagehold-test-", dir="/dev/shm"))
    processes = Processes(StateDir.prepare(root))
    yield processes
    for process in processes.started:
        process.kill()
        process.communicate()
    shutil.rmtree(root)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--failpoints=executor.run.before=explode", "want NAME=kill|stop"),
        ("--model=/nowhere/at/all", "/nowhere/at/all"),
        ("--max-model-len=1000000", "is more than the model's"),
        ("--device=cuda", "use --device cpu"),
    ],
)
def test_a_wrong_setting_is_said_in_one_line(run: Processes, flag: str, said: str) -> None:
    code, message = ended(run.executor(flag))
    assert code == 78 and said in message and "Traceback" not in message


def test_it_can_be_stopped_while_there_is_no_manager(run: Processes) -> None:
    process = run.executor()
    run.until("executor", State.STARTING, process.pid)
    time.sleep(1)
    process.terminate()
    assert ended(process, 5)[0] == 0


def test_a_standby_can_be_stopped_and_leaves_the_executors_progress_alone(run: Processes) -> None:
    lock = FileLock(run.state.executor_lock)
    lock.acquire()
    lock.write_id(b"the one that has")
    Progress(run.state.progress("executor")).set_state(State.READY)
    before = run.state.progress("executor").read_bytes()
    standby = run.executor()
    run.until("executor-standby", State.STANDBY, standby.pid)
    standby.terminate()
    assert ended(standby, 5)[0] == 0
    assert run.state.progress("executor").read_bytes() == before
    assert run.state.executor_lock.read_bytes() == b"the one that has"


def test_a_pool_that_does_not_fit_ends_it_for_good(run: Processes) -> None:
    run.start("kvmanager")
    code, said = ended(run.start("executor", "--kv-memory=4000GiB", "--threads=1"))
    assert code == 78 and "choose a smaller --kv-memory" in said


async def _submit(state: StateDir) -> None:
    """One request; its answer is not waited for."""
    async with grpc.aio.insecure_channel(f"unix:{state.executor_socket}") as channel:
        stream = ex_grpc.ExecutorServiceStub(channel).Connect(wait_for_ready=True)
        request = api.GenerateRequest(request_id="r").SerializeToString()
        submit = ex.Submit(stream_id=1, tenant="default", request=request, digest=b"d", prompt=[5, 6, 7], max_tokens=50)
        await stream.write(ex.ConnectRequest(submit=submit))
        await stream.read()


def test_a_fault_in_a_step_ends_it_at_once_and_the_next_one_goes_on(run: Processes) -> None:
    run.start("kvmanager")
    process = run.executor("--failpoints=executor.run.after=error@5")
    run.until("executor", State.READY, process.pid)
    try:
        asyncio.run(asyncio.wait_for(_submit(run.state), 20))
    except grpc.aio.AioRpcError:
        pass
    code, said = ended(process, 10)
    assert code == 1 and "step failed" in said
    successor = run.executor()
    run.until("executor", State.READY, successor.pid)
    deadline = time.monotonic() + 20
    while (view := read_progress(run.state.progress("executor"))) is None or not view.committed:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    successor.terminate()
    code, said = ended(successor, 10)
    assert code == 0 and '"requests recovered"' in said


def test_a_standby_takes_over_and_whoever_lost_the_lock_file_ends(run: Processes) -> None:
    run.start("kvmanager")
    first = run.executor()
    run.until("executor", State.READY, first.pid)
    standby = run.executor()
    run.until("executor-standby", State.STANDBY, standby.pid)
    first.kill()
    run.until("executor", State.READY, standby.pid)
    # Another id in the file: the next attach, after a restart of the manager, is refused.
    run.state.executor_lock.write_bytes(b"somebody else's.")
    run.started[0].kill()
    run.start("kvmanager")
    code, said = ended(standby, 20)
    assert code == 1 and "executor.lock names another executor" in said
