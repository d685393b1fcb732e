"""Images and deployments; without an engine every test here is skipped, and says why."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.compose import engine
from tests.compose.engine import Deployment

VERSION = "0"


@pytest.fixture(scope="session")
def images() -> str:
    """Their version."""
    if reason := engine.why_not():
        pytest.skip(reason)
    try:
        for target in engine.TARGETS.values():
            engine.build(target, VERSION)
    except AssertionError as error:
        # Where nothing can be fetched there is no image to test; a broken Dockerfile is found where something can.
        if any(sign in str(error) for sign in ("manifest unknown", "pull access denied", "dial tcp", "i/o timeout")):
            pytest.skip(f"the base image cannot be had: {str(error).strip().splitlines()[-1][:200]}")
        raise
    return VERSION


@pytest.fixture
def deploy(images: str) -> Iterator[Callable[..., Deployment]]:
    """deploy(**environment) -> Deployment, not up yet. All are down at the end."""
    yield from _deployments(images)


@pytest.fixture(scope="module")
def deployment(images: str) -> Iterator[Deployment]:
    """One that is up, for tests that leave it as it is, or bring it back."""
    deployments = _deployments(images)
    found = next(deployments)(PAGEHOLD_DRAIN_GRACE="1")
    found.up()
    yield found
    next(deployments, None)


def _deployments(version: str) -> Iterator[Callable[..., Deployment]]:
    made: list[Deployment] = []

    def deploy(**environment: str) -> Deployment:
        versions = {f"PAGEHOLD_{name}_VERSION": version for name in ("FRONTEND", "KVMANAGER", "EXECUTOR")}
        made.append(Deployment(**{**versions, **environment}))
        return made[-1]

    try:
        yield deploy
    finally:
        for one in made:
            one.down()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes many minutes is for `scripts/test-compose`."""
    if os.environ.get("PAGEHOLD_TEST_COMPOSE") == "all":
        return
    for item in items:
        if item.get_closest_marker("long_compose"):
            item.add_marker(pytest.mark.skip("run by scripts/test-compose"))
