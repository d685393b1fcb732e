"""The promise, first form: kill -9 any component under load, and every stream goes on as if nothing was."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import Stack
from tests.faults.streams import Load, prefilled, request, undisturbed

pytestmark = pytest.mark.stack

StartStack = Callable[..., Stack]


async def test_executor_killed_streams_go_on(start_stack: StartStack) -> None:
    stack = start_stack()
    messages = [request(number, tokens=96) for number in range(8)]
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


@pytest.mark.parametrize(
    ("failpoint", "hits"),
    [("executor.ensure.after", 4), ("executor.commit.before", 110), ("executor.publish.before", 18)],
)
async def test_executor_killed_at_a_border(start_stack: StartStack, failpoint: str, hits: int) -> None:
    messages = [request(number, tokens=48) for number in range(8)]
    quiet = start_stack()
    reference = await undisturbed(quiet.address, messages)
    quiet.stop()

    # Every executor dies at that hit: several deaths in one run.
    stack = start_stack(environment={"PAGEHOLD_FAILPOINTS": f"{failpoint}=kill@{hits}"})
    assert await Load(stack.address, messages).answers() == reference
    assert stack.log.read_text().count("killed by SIGKILL") >= 2


async def test_manager_killed_streams_go_on(start_stack: StartStack) -> None:
    stack = start_stack()
    messages = [request(number, tokens=128) for number in range(8)]
    reference = await undisturbed(stack.address, messages)

    load = Load(stack.address, messages)
    for _ in range(3):
        await load.reach(16)
        stack.kill("kvmanager")
    assert await load.answers() == reference


@pytest.mark.parametrize("stop", [(), (" the",)], ids=("plain", "stop-string"))
async def test_frontend_killed_resume_gives_the_rest(start_stack: StartStack, stop: tuple[str, ...]) -> None:
    stack = start_stack()
    messages = [request(number, tokens=96) for number in range(8)]
    for message in messages:
        # A stop string that comes late: it counts only from the 60th token on.
        message.stopping.stop.extend(stop)
        message.stopping.min_tokens = 60 if stop else 0
    reference = await undisturbed(stack.address, messages)

    load = Load(stack.address, messages, resume=True)
    await load.reach(20)
    stack.kill("frontend")
    assert await load.answers() == reference
    assert all(one.accepted == 2 for one in load.heard), "a stream was not resumed: nothing is shown"


async def test_everything_killed_one_after_the_other(start_stack: StartStack) -> None:
    stack = start_stack()
    messages = [request(number, tokens=160) for number in range(8)]
    reference = await undisturbed(stack.address, messages)

    load = Load(stack.address, messages, resume=True)
    for component in ("executor", "kvmanager", "frontend", "kvmanager", "executor"):
        await load.reach(10)
        stack.kill(component)
    assert await load.answers() == reference
