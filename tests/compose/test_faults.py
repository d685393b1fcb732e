"""One container after the other is killed or restarted under load: all streams end as if nothing had been."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import permutations
from typing import Final

import pytest

from pagehold.v1 import inference_pb2 as api
from tests.compose import engine
from tests.compose.engine import Deployment
from tests.compose.load import ClientLoad, undisturbed
from tests.faults.streams import request

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

COMPONENTS: Final = ("executor", "kvmanager", "frontend")
# Those that a stream gets between the faults, 256 while it has no frontend, and what the first client that is back
# hears before the last one is.
_TOKENS: Final = 640


def kill_component(deployment: Deployment, service: str) -> None:
    """`pagehold run` is there and starts another."""
    engine.kill(deployment.component_pid(service))


def kill_main(deployment: Deployment, service: str) -> None:
    """The whole container dies; its restart policy brings it back."""
    before = deployment.main_pid(service)
    engine.kill(before)
    while deployment.main_pid(service) == before:
        pass


def kill_container(deployment: Deployment, service: str) -> None:
    """Which the restart policy takes for the operator's will."""
    engine.run("docker", "kill", deployment.container(service))
    deployment("start", service)


def restart(deployment: Deployment, service: str) -> None:
    deployment("restart", service)


FAULTS: Final = (kill_component, kill_main, kill_container, restart)
ORDERS: Final = tuple(permutations(COMPONENTS))


def messages_of(name: str, tokens: int = _TOKENS) -> list[api.GenerateRequest]:
    """Two greedy, two seeded."""
    messages = [request(number, tokens) for number in range(4)]
    for message in messages:
        message.request_id += f"-{name}"
    return messages


async def round_of(
    deployment: Deployment, fault: Callable[[Deployment, str], None], order: tuple[str, ...], name: str
) -> None:
    """One fault for each component, each once streams go on after the one before."""
    messages = messages_of(name)
    reference = await undisturbed(deployment.address, messages)
    load = ClientLoad(deployment.address, messages)
    for service in order:
        await load.reach(5)
        await asyncio.to_thread(fault, deployment, service)
    assert await load.answers() == reference
    assert all(one.accepted == 1 for one in load.heard)


@pytest.mark.parametrize("fault", FAULTS)
async def test_every_component(deployment: Deployment, fault: Callable[[Deployment, str], None]) -> None:
    await round_of(deployment, fault, COMPONENTS, fault.__name__)


@pytest.mark.long_compose
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("fault", FAULTS)
async def test_every_order(
    deployment: Deployment, fault: Callable[[Deployment, str], None], order: tuple[str, ...]
) -> None:
    await round_of(deployment, fault, order, f"{fault.__name__}-{'-'.join(order)}")
