"""The promise, first form: kill -9 any component under load, and every stream goes on as if nothing was."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable

import pytest

from services.cli.await_ready import await_ready
from tests.conftest import START_SECONDS, Stack
from tests.faults.streams import Load, drafts_accepted, mixed, prefilled, repeating, request, undisturbed

pytestmark = pytest.mark.stack

StartStack = Callable[..., Stack]
COMPONENTS = ("frontend", "executor", "kvmanager")


def kill_everything(stack: Stack, pids: dict[str, int]) -> None:
    """All components and their supervisor, stopped first: no one of them sees another one die."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in (stack.process.pid, *pids.values()):
            os.kill(pid, number)
    stack.process.wait()


def up_again(stack: Stack) -> None:
    """`pagehold up` with the same flags, state folder and port."""
    with stack.log.open("a") as log:
        stack.process = subprocess.Popen(stack.process.args, stderr=log, stdout=log)
    assert await_ready(stack.address, stack.process.pid, START_SECONDS), stack.log.read_text()[-3000:]


@pytest.mark.parametrize("flags", [{}, {"weights": "int8", "kv_dtype": "int8"}], ids=["as-it-comes", "int8"])
async def test_executor_killed_streams_go_on(start_stack: StartStack, flags: dict[str, str]) -> None:
    stack = start_stack(**flags)
    messages = mixed()
    reference = await undisturbed(stack.address, messages)

    load = Load(stack.address, messages)
    await load.reach(20)
    before = stack.kill("executor")
    answers = await load.answers()

    assert stack.pids()["executor"] != before
    assert answers == reference
    assert all(one.accepted == 1 for one in load.heard)
    # The successor counts from zero: whatever it prefilled was computed twice.
    assert prefilled(stack.address) == 0


async def test_executor_killed_with_drafts_under_way(start_stack: StartStack) -> None:
    """Tokens and K/V of drafts lie above what is committed, and are nobody's when the executor is gone."""
    stack = start_stack()
    messages = [repeating(number, tokens=800) for number in range(4)]
    plain = start_stack(speculation="off")
    reference = await undisturbed(plain.address, messages)

    load = Load(stack.address, messages)
    for _ in range(2):
        await load.reach(1)
        await asyncio.wait_for(drafts_accepted(stack.address), 30)
        assert not load.any_over, "a stream ended before the fault"
        stack.kill("executor")
    assert await load.answers() == reference
    assert prefilled(stack.address) == 0


@pytest.mark.parametrize("flags", [{}, {"weights": "int8", "kv_dtype": "int8"}], ids=["as-it-comes", "int8"])
async def test_manager_killed_streams_go_on(start_stack: StartStack, flags: dict[str, str]) -> None:
    stack = start_stack(**flags)
    messages = mixed(tokens=256)
    reference = await undisturbed(stack.address, messages)

    load = Load(stack.address, messages)
    await load.reach(1)
    before = prefilled(stack.address)
    for _ in range(3):
        await load.reach(16)
        stack.kill("kvmanager")
    assert await load.answers() == reference
    assert prefilled(stack.address) == before


async def test_manager_and_executor_killed_together(start_stack: StartStack) -> None:
    stack = start_stack()
    messages = mixed()
    reference = await undisturbed(stack.address, messages)

    load = Load(stack.address, messages)
    await load.reach(20)
    pids = stack.pids()
    for component in ("kvmanager", "executor"):
        os.kill(pids[component], signal.SIGKILL)
    assert await load.answers() == reference
    assert prefilled(stack.address) == 0


async def test_everything_killed_at_once(start_stack: StartStack) -> None:
    """Only the files are left, and clients that ask again."""
    stack = start_stack()
    messages = mixed(tokens=128)
    reference = await undisturbed(stack.address, messages)

    before = stack.pids()
    load = Load(stack.address, messages, resume=True)
    await load.reach(20)
    kill_everything(stack, before)
    up_again(stack)
    assert await load.answers() == reference
    after = stack.pids()
    assert not any(after[component] == before[component] for component in COMPONENTS)
    assert all(one.accepted == 2 for one in load.heard), "a stream was not resumed: nothing is shown"
    assert prefilled(stack.address) == 0


@pytest.mark.parametrize("stop", [(" the",)], ids=("stop-string",))
async def test_frontend_killed_resume_gives_the_rest(start_stack: StartStack, stop: tuple[str, ...]) -> None:
    stack = start_stack()
    messages = mixed()
    for message in messages:
        # A stop string that comes late: it counts only from the 60th token on.
        message.stopping.stop.extend(stop)
        message.stopping.min_tokens = 60 if stop else 0
    reference = await undisturbed(stack.address, messages)

    pid = stack.pids()["frontend"]  # looked up first: streams may end while `status` starts on a busy machine
    load = Load(stack.address, messages, resume=True)
    await load.reach(20)
    before = prefilled(stack.address)
    os.kill(pid, signal.SIGKILL)
    assert await load.answers() == reference
    assert all(one.accepted == 2 for one in load.heard), "a stream was not resumed: nothing is shown"
    assert prefilled(stack.address) == before


async def test_everything_killed_one_after_the_other(start_stack: StartStack) -> None:
    stack = start_stack()
    messages = [request(number, tokens=160) for number in range(8)]
    reference = await undisturbed(stack.address, messages)

    load = Load(stack.address, messages, resume=True)
    for component in ("executor", "kvmanager", "frontend", "kvmanager", "executor"):
        await load.reach(10)
        stack.kill(component)
    assert await load.answers() == reference
