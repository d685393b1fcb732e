"""The promise, first form: kill -9 any component under load, and every stream goes on as if nothing was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.faults.streams import generate, prefilled, request, undisturbed

pytestmark = pytest.mark.stack


async def _mid_stream(tasks: list[asyncio.Task[object]], seconds: float) -> None:
    await asyncio.sleep(seconds)
    assert not all(task.done() for task in tasks), "all streams ended before the kill: nothing is shown"


async def test_executor_killed_streams_go_on(start_stack: Callable[..., object]) -> None:
    stack = start_stack(kv_memory="512MiB")
    messages = [request(number, tokens=128) for number in range(8)]
    reference = await undisturbed(stack.address, messages)
    before = stack.pids()["executor"]

    tasks = [asyncio.create_task(generate(stack.address, message)) for message in messages]
    await _mid_stream(tasks, 0.8)
    stack.kill("executor")
    heard = await asyncio.gather(*tasks)

    assert stack.pids()["executor"] != before
    assert [one.answer for one in heard] == [one.answer for one in reference]
    assert all(one.accepted == 1 for one in heard)
    # The successor counts from zero: whatever it prefilled was computed twice.
    assert prefilled(stack.address) == 0


@pytest.mark.parametrize("failpoint", ["executor.ensure.after", "executor.commit.before", "executor.publish.before"])
async def test_executor_killed_at_a_border(start_stack: Callable[..., object], failpoint: str) -> None:
    messages = [request(number, tokens=64) for number in range(8)]
    quiet = start_stack(kv_memory="512MiB")
    reference = await undisturbed(quiet.address, messages)
    quiet.stop()

    # Every executor dies at its 40th hit: several deaths in one run.
    stack = start_stack(kv_memory="512MiB", environment={"PAGEHOLD_FAILPOINTS": f"{failpoint}=kill@40"})
    heard = await asyncio.gather(*(generate(stack.address, message) for message in messages))
    assert [one.answer for one in heard] == [one.answer for one in reference]


async def test_manager_killed_streams_go_on(start_stack: Callable[..., object]) -> None:
    stack = start_stack(kv_memory="512MiB")
    messages = [request(number, tokens=128) for number in range(8)]
    reference = await undisturbed(stack.address, messages)

    tasks = [asyncio.create_task(generate(stack.address, message)) for message in messages]
    for _ in range(3):
        await _mid_stream(tasks, 0.4)
        stack.kill("kvmanager")
    heard = await asyncio.gather(*tasks)
    assert [one.answer for one in heard] == [one.answer for one in reference]


@pytest.mark.parametrize("stop", [(), (" the",)])
async def test_frontend_killed_resume_gives_the_rest(start_stack: Callable[..., object], stop: tuple[str, ...]) -> None:
    stack = start_stack(kv_memory="512MiB")
    messages = [request(number, tokens=128) for number in range(8)]
    for message in messages:
        # A stop string that comes late: it counts only from the 60th token on.
        message.stopping.stop.extend(stop)
        message.stopping.min_tokens = 60 if stop else 0
    reference = await undisturbed(stack.address, messages)

    tasks = [asyncio.create_task(generate(stack.address, message, resume=True)) for message in messages]
    await _mid_stream(tasks, 0.6)
    stack.kill("frontend")
    heard = await asyncio.gather(*tasks)
    assert [one.answer for one in heard] == [one.answer for one in reference]
    assert any(one.accepted == 2 for one in heard), "no stream was resumed: nothing is shown"


async def test_everything_killed_one_after_the_other(start_stack: Callable[..., object]) -> None:
    stack = start_stack(kv_memory="512MiB")
    messages = [request(number, tokens=160) for number in range(8)]
    reference = await undisturbed(stack.address, messages)

    tasks = [asyncio.create_task(generate(stack.address, message, resume=True)) for message in messages]
    for component in ("executor", "kvmanager", "frontend", "kvmanager", "executor"):
        await asyncio.sleep(0.5)
        stack.kill(component)
    heard = await asyncio.gather(*tasks)
    assert [one.answer for one in heard] == [one.answer for one in reference]
