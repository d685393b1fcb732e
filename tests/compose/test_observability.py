"""A real Prometheus beside the others: it finds all of them, and every rule and panel shows what it should."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import promql_parser
import pytest

from tests.compose import engine
from tests.compose.engine import Deployment
from tests.compose.load import ClientLoad
from tests.conftest import free_port
from tests.deploy.test_alerts import rules
from tests.deploy.test_dashboard import compose, panels
from tests.faults.streams import repeating, request

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900), pytest.mark.long_compose]

_SERVICES: Final = ("frontend", "kvmanager", "executor", "prometheus")
_SECONDS: Final = 60.0
_TWO_SCRAPES: Final = 11.0


class Prometheus:
    """One that compose.yaml has started, through its HTTP API."""

    def __init__(self, address: str) -> None:
        self._address = address

    def get(self, path: str, **parameters: str) -> Any:
        """Raises AssertionError with what it says is wrong, OSError while nobody answers."""
        try:
            with urlopen(f"http://{self._address}/api/v1/{path}?{urlencode(parameters)}", timeout=10) as answer:
                return json.load(answer)["data"]
        except HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error

    def values(self, expression: str) -> list[float]:
        """One for each series."""
        return [float(one["value"][1]) for one in self.get("query", query=expression)["result"]]

    def targets(self) -> list[tuple[str, str]]:
        """Of each address that is scraped, its health: up, down or unknown; and the address."""
        try:
            found = self.get("targets")["activeTargets"]
        except OSError:
            return []
        return sorted((one["health"], one["labels"]["instance"]) for one in found)

    def rules(self) -> dict[str, tuple[str, str]]:
        """Of each alert, how its last evaluation went, and its state: inactive, pending, firing."""
        groups = self.get("rules")["groups"]
        return {rule["name"]: (rule["health"], rule["state"]) for group in groups for rule in group["rules"]}

    async def until(self, is_so: Callable[[], bool]) -> None:
        give_up = time.monotonic() + _SECONDS
        while not await asyncio.to_thread(is_so):
            assert time.monotonic() < give_up, (self.targets(), self.rules())
            await asyncio.sleep(0.5)


@pytest.fixture(scope="session")
def prometheus_image(images: str) -> str:
    """The one that compose.yaml names where it can be had; else Debian's."""
    named = str(compose()["services"]["prometheus"]["image"]).partition(":-")[2].rstrip("}")
    return named if "Status:" in engine.run("docker", "pull", named, check=False) else engine.build_prometheus()


@pytest.fixture
def deployment(deploy: Callable[..., Deployment], prometheus_image: str) -> Deployment:
    """With two frontends, and Prometheus at PROMETHEUS_PUBLISH."""
    first = min(free_port(), 65_000)
    made = deploy(
        PAGEHOLD_PUBLISH=f"127.0.0.1:{first}-{first + 1}",
        PROMETHEUS_PUBLISH=f"127.0.0.1:{free_port()}",
        PROMETHEUS_IMAGE=prometheus_image,
    )
    made.address = f"127.0.0.1:{first}"
    made.up("--scale", "frontend=2", *_SERVICES)
    return made


def compared(expression: str) -> str:
    """What an alert looks at: there whether or not the alert is."""
    parsed = promql_parser.parse(expression)
    if isinstance(parsed, promql_parser.Call) and parsed.func.name == "absent":
        return str(parsed.args[0].prettify())
    assert isinstance(parsed, promql_parser.BinaryExpr), expression
    return str(parsed.lhs.prettify())


async def test_everything_is_found_and_shown(deployment: Deployment) -> None:
    prometheus = Prometheus(deployment.environment["PROMETHEUS_PUBLISH"])
    await prometheus.until(lambda: [health for health, _ in prometheus.targets()] == ["up"] * 4)
    for turn in range(3):
        messages = [request(0, 60), request(1, 60), repeating(2, 160)]
        for message in messages:
            message.request_id += f"-turn-{turn}"
        await ClientLoad(deployment.address, messages).answers()
        await asyncio.sleep(_TWO_SCRAPES)
    engine.kill(deployment.component_pid("kvmanager"))
    await asyncio.to_thread(deployment.await_component, "kvmanager")
    await asyncio.sleep(_TWO_SCRAPES)

    # All that alerts look at is there, and none has a cause.
    assert all(prometheus.values(compared(rule["expr"])) for rule in rules()), {
        rule["alert"]: prometheus.values(compared(rule["expr"])) for rule in rules()
    }
    assert prometheus.rules() == {rule["alert"]: ("ok", "inactive") for rule in rules()}
    shown = {
        (panel["title"], target["refId"]): prometheus.values(target["expr"])
        for panel in panels()
        for target in panel["targets"]
    }
    assert all(values and not any(map(math.isnan, values)) for values in shown.values()), shown
    assert len(shown["Components", "A"]) == 3
    assert sum(shown["Deaths in the last hour", "A"]) >= 1
    assert sum(shown["Tokens a second", "A"]) > 0 and sum(shown["Prefix hits", "A"]) > 0

    # All components go, in containers that nobody starts again: each is missed.
    frontends = deployment.containers("frontend")
    engine.run("docker", "kill", *frontends, deployment.container("executor"))
    missed = {"PageholdGone", "PageholdExecutorAway", "PageholdNoFrontend"}
    await prometheus.until(
        lambda: {name for name, (_, state) in prometheus.rules().items() if state != "inactive"} >= missed
    )
    await prometheus.until(lambda: prometheus.targets() == [("down", "executor:9464"), ("up", "kvmanager:9464")])
    assert prometheus.rules()["PageholdNoFrontend"][1] != "inactive"
