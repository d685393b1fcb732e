"""`pagehold restart`, a standby and several frontends: processes change, and no stream shows it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from pagehold.runtime.statedir import StateDir
from pagehold.supervisor.v1 import supervisor_pb2 as pb
from pagehold.supervisor.v1 import supervisor_pb2_grpc as pb_grpc
from services.cli.status import collect
from tests.conftest import COMMAND, Stack, free_port
from tests.faults.streams import Load, generate, mixed, request, undisturbed

pytestmark = pytest.mark.stack

StartStack = Callable[..., Stack]
SECONDS = 60.0  # far longer than anything here takes


def restart(state_dir: Path, component: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "restart", component, "--state-dir", str(state_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)


async def restarted(stack: Stack, component: str) -> list[str]:
    """What it says."""
    done = await asyncio.to_thread(restart, stack.state_dir, component)
    assert done.returncode == 0, done.stderr + stack.log.read_text()[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


async def asked(stack: Stack, component: str) -> None:
    """The call that the command makes."""
    async with grpc.aio.insecure_channel(f"unix:{StateDir(stack.state_dir).supervisor_socket}") as channel:
        async for _ in pb_grpc.SupervisorServiceStub(channel).Restart(pb.RestartRequest(component=component)):
            pass


async def until(stack: Stack, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Components as `pagehold status` shows them, once they are as wanted."""
    give_up = time.monotonic() + SECONDS
    while not wanted(found := collect(StateDir(stack.state_dir))["components"]):
        await asyncio.sleep(0.02)
        assert time.monotonic() < give_up, f"{found}\n{stack.log.read_text()[-3000:]}"
    return found


@asynccontextmanager
async def knocking(address: str) -> Any:
    """New clients all the time, each with a connection and a short request of its own: none may be turned away."""
    answered = 0
    over = False

    async def knock(number: int) -> None:
        nonlocal answered
        while not over:
            message = request(0, tokens=1)
            message.request_id = ""
            await generate(address, message)
            answered += 1

    knockers = [asyncio.create_task(knock(number)) for number in range(2)]
    yield
    over = True
    await asyncio.gather(*knockers)
    assert answered > 10


async def test_each_component_under_load(start_stack: StartStack) -> None:
    # Streams have so little time that the frontend's restart cuts some off, which then go on at the new one.
    stack = start_stack(connection_age=1, drain_grace=1)
    messages = mixed(tokens=600)
    reference = await undisturbed(stack.address, messages)
    before = stack.pids()
    load = Load(stack.address, messages, resume=True)
    await load.reach(5)

    said = await restarted(stack, "executor")
    assert said[-1] == f"executor: ready (pid {(now := stack.pids())['executor']})"
    assert now == {**before, "executor": now["executor"]} != before
    await load.reach(5)

    said = await restarted(stack, "kvmanager")
    assert said[-1] == f"kvmanager: ready (pid {(now := stack.pids())['kvmanager']})"
    assert now["kvmanager"] != before["kvmanager"] and now["frontend"] == before["frontend"]
    await load.reach(5)

    async with knocking(stack.address):
        first = asyncio.create_task(restarted(stack, "frontend"))
        await until(stack, lambda found: "frontend-2" in found)
        with pytest.raises(grpc.aio.AioRpcError, match="another restart is under way"):
            await asked(stack, "executor")
        said = await first
    now = stack.pids()
    assert said[-1] == f"frontend-2: ready (pid {now['frontend-2']})"
    assert now["frontend"] is None
    assert await load.answers() == reference
    assert "component ended" not in stack.log.read_text(), "what was asked for counts as a death"


def is_complete(found: dict[str, Any]) -> bool:
    """All ready, and a standby."""
    states = {name: one["state"] for name, one in found.items()}
    return states.pop("executor-standby", "") == "standby" and set(states.values()) == {"ready"}


async def test_a_standby_takes_over_and_is_replaced(start_stack: StartStack) -> None:
    stack = start_stack(standby=True, frontends=2, connection_age=0.5)
    found = await until(stack, is_complete)
    assert set(found) == {"frontend", "frontend-2", "kvmanager", "executor", "executor-standby"}
    messages = [request(number, tokens=100) for number in range(4)]
    reference = await undisturbed(stack.address, messages)

    load = Load(stack.address, messages, resume=True)
    await load.reach(5)
    stack.kill("executor")
    standby = found["executor-standby"]["pid"]
    await until(stack, lambda now: now["executor"] == {**now["executor"], "pid": standby, "state": "ready"})
    now = await until(stack, is_complete)
    assert now["executor-standby"]["pid"] != standby
    assert await load.answers() == reference

    # One that stands still takes nothing over, however long one waits for it.
    os.kill(now["executor-standby"]["pid"], signal.SIGSTOP)
    stack.kill("executor")
    gone = {standby, now["executor-standby"]["pid"]}
    now = await until(stack, lambda now: is_complete(now) and not gone & {one["pid"] for one in now.values()})
    assert "standby hangs: it does not take over" in stack.log.read_text()

    # Both frontends go, one after the other, and so do both executors.
    assert [line.partition(" (")[0] for line in await restarted(stack, "frontend")] == [
        "frontend-3: starting", "frontend: stopping", "frontend-3: ready",
        "frontend: starting", "frontend-2: stopping", "frontend: ready",
    ]  # fmt: skip
    await restarted(stack, "executor")
    pids = stack.pids()
    assert set(pids) == {"frontend", "frontend-3", "kvmanager", "executor", "executor-standby"}
    assert not {one["pid"] for one in now.values()} & {pids["executor"], pids["executor-standby"], pids["frontend"]}


async def test_a_new_process_that_cannot_run_changes_nothing(start_stack: StartStack, tmp_path: Path) -> None:
    config = tmp_path / "pagehold.toml"
    config.touch()
    stack = start_stack(environment={"PAGEHOLD_CONFIG": str(config)})
    before = stack.pids()
    config.write_text("page_size = 32\n")
    failed = await asyncio.to_thread(restart, stack.state_dir, "executor")
    assert failed.returncode == 1
    assert "the new executor cannot run here; its message is in the log. The old one goes on" in failed.stderr
    assert "another page size" in stack.log.read_text()
    assert stack.pids() == before
    config.write_text("")
    # One that is dead, and would be started again some time later, is started now.
    for _ in range(4):
        stack.kill("kvmanager")
    await restarted(stack, "kvmanager")
    await generate(stack.address, request(0, tokens=4))


@pytest.mark.parametrize("words", [("up",), ("up", "--frontends", "2"), ("run", "frontend")])
def test_a_port_that_somebody_shares_is_not_shared_with_strangers(
    stack: Stack, tmp_path: Path, words: tuple[str, ...]
) -> None:
    state = tmp_path / "state"
    command = [*COMMAND, *words, "--state-dir", str(state), "--listen", stack.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 78, done.stderr
    assert done.stderr == (
        f"pagehold {words[0]}: cannot listen on {stack.address}: in use or not allowed; choose another --listen\n"
    )
    assert words[0] == "run" or not state.exists()


def test_a_frontend_of_the_same_number_is_refused(stack: Stack) -> None:
    command = [*COMMAND, "frontend", "--state-dir", str(stack.state_dir), "--listen", f"127.0.0.1:{free_port()}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 78
    assert "another frontend runs on" in done.stderr and "--instance" in done.stderr


def test_without_a_supervisor(tmp_path: Path) -> None:
    done = restart(tmp_path, "executor")
    assert done.returncode == 1
    assert f"no supervisor of executors runs on {tmp_path}" in done.stderr
