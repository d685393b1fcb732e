"""An executor that is only stopped keeps its place, however long; whoever asks for readiness hears that it is away."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import pytest

from pagehold.runtime.statedir import StateDir
from services.cli.await_ready import await_ready
from services.cli.status import collect
from tests.faults.release import HERE
from tests.faults.streams import Load, mixed, prefilled, undisturbed
from tests.faults.test_skew import cluster

pytestmark = pytest.mark.stack

SECONDS = 60.0  # far longer than anything here takes


async def until(found: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(SECONDS):
        while not await asyncio.to_thread(found):
            await asyncio.sleep(0.05)


def is_ready(address: str) -> bool:
    return await_ready(address, seconds=0.5)


async def test_a_standby_waits_for_the_death_of_one_that_is_stopped() -> None:
    with cluster(HERE, hang_seconds=2) as made:
        state = StateDir(made.state_dir)
        messages = mixed(tokens=160)
        reference = await undisturbed(made.address, messages)
        active = made.running["executor"]
        made.start("executor", HERE)
        standby = made.running["executor"]
        made.others.append(active)

        def standby_state() -> str:
            return str(collect(state)["components"].get("executor-standby", {}).get("state"))

        await until(lambda: standby_state() == "standby", "no standby")
        epoch = collect(state)["components"]["kvmanager"]["epoch"]
        load = Load(made.address, messages)
        await load.reach(20)
        os.kill(active.pid, signal.SIGSTOP)
        await asyncio.sleep(0.2)  # what was on its way arrives
        heard = load.heard[0].least
        await asyncio.sleep(2)
        assert standby_state() == "standby" and load.heard[0].least == heard
        os.kill(active.pid, signal.SIGCONT)
        await load.reach(20)
        assert collect(state)["components"]["kvmanager"]["epoch"] == epoch

        os.kill(active.pid, signal.SIGKILL)
        assert await load.answers() == reference
        components = collect(state)["components"]
        assert components["executor"]["pid"] == standby.pid and components["kvmanager"]["epoch"] == epoch + 1
        assert prefilled(made.address) == 0


async def test_a_frontend_is_not_ready_while_a_bare_executor_is_stopped() -> None:
    """There is no supervisor that finds it. Afterwards the streams go on."""
    with cluster(HERE, hang_seconds=2) as made:
        messages = mixed(tokens=160)
        reference = await undisturbed(made.address, messages)
        load = Load(made.address, messages)
        await load.reach(20)
        executor = made.running["executor"]
        os.kill(executor.pid, signal.SIGSTOP)
        await until(lambda: not is_ready(made.address), "ready for ever")
        os.kill(executor.pid, signal.SIGCONT)
        await until(lambda: is_ready(made.address), "not ready again")
        assert await load.answers() == reference
