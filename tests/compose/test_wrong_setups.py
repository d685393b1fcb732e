"""A set-up that cannot work says so in one line, and waits or ends; what waits takes no processor."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from tests.compose import engine
from tests.compose.engine import IMAGES, Deployment
from tests.conftest import free_port

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

Deploy = Callable[..., Deployment]
Start = Callable[..., str]
_CONFIG: Final = 78
_SECONDS: Final = 60.0


@pytest.fixture
def start(images: str) -> Iterator[Start]:
    """start(component, *docker flags, words=()) -> container. All are gone at the end."""
    names: list[str] = []

    def run(component: str, *flags: str, words: tuple[str, ...] = ()) -> str:
        names.append(f"pagehold-test-{os.getpid()}-wrong-{len(names)}")
        image = f"{IMAGES}/{engine.TARGETS[component]}:{images}"
        hard = ("--read-only", "--cap-drop", "ALL", "--init", "--tmpfs", "/tmp:uid=10001")
        engine.run("docker", "run", "--detach", "--name", names[-1], *hard, *flags, image, "run", component, *words)
        return names[-1]

    yield run
    engine.run("docker", "rm", "--force", "--volumes", *names, check=False)


def logs(container: str) -> str:
    return engine.run("docker", "logs", container)


def says(container: str, text: str) -> None:
    """Waits until it has said this; it must go on running."""
    give_up = time.monotonic() + _SECONDS
    while text not in logs(container):
        assert time.monotonic() < give_up, logs(container)
        time.sleep(0.1)
    assert engine.inspect(container)["State"]["Running"]


def ends(container: str, text: str) -> None:
    """Waits for its end: a wrong set-up's exit code, and one line about it."""
    assert engine.run("docker", "wait", container).strip() == str(_CONFIG), logs(container)
    said = [line for line in logs(container).splitlines() if line.startswith("pagehold")]
    assert len([line for line in said if text in line]) == 1, logs(container)
    assert "Traceback" not in logs(container)


@pytest.mark.parametrize("component", ["kvmanager", "executor"])
def test_no_shared_volume(start: Start, component: str) -> None:
    ends(start(component), "cannot make the state folder /run/pagehold: ")


@pytest.mark.parametrize("component", ["kvmanager", "executor"])
def test_another_user(start: Start, component: str) -> None:
    mount = ("--tmpfs", "/run/pagehold:uid=10001,mode=0777", "--user", "4711:4711")
    ends(start(component, *mount), "the state folder /run/pagehold belongs to another user")


def test_no_manager(start: Start) -> None:
    container = start("executor", "--tmpfs", "/run/pagehold:uid=10001", "--tmpfs", "/cache:uid=10001")
    says(container, '"socket": "/run/pagehold/kvmanager.sock", "event": "nobody listens there; waiting.')


def test_no_executor(start: Start) -> None:
    container = start("frontend", "--tmpfs", "/run/pagehold:uid=10001")
    says(container, '"socket": "/run/pagehold/executor.sock", "event": "nobody listens there; waiting.')


def test_no_such_model(start: Start) -> None:
    container = start("executor", "--tmpfs", "/run/pagehold:uid=10001", "--env", "PAGEHOLD_MODEL=/models/none.gguf")
    ends(container, "no model at /models/none.gguf")


def test_no_gpu(start: Start) -> None:
    mounts = ("--tmpfs", "/run/pagehold:uid=10001", "--tmpfs", "/cache:uid=10001")
    container = start("executor", *mounts, "--env", "PAGEHOLD_DEVICE=cuda")
    ends(container, "--device cuda")
    assert "converting" not in logs(container)


def test_no_room_for_a_converted_model(start: Start) -> None:
    """A read-only root, and no volume for the cache."""
    container = start("executor", "--tmpfs", "/run/pagehold:uid=10001")
    ends(container, "cannot prepare the default model in /cache/pagehold/models: Read-only file system")


def test_the_port_is_taken_inside(start: Start) -> None:
    """As it can be with the machine's network."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        mount = ("--tmpfs", "/run/pagehold:uid=10001", "--network", "host")
        container = start("frontend", *mount, "--env", f"PAGEHOLD_LISTEN=0.0.0.0:{port}")
        ends(container, f"cannot listen on 0.0.0.0:{port}")


def test_the_port_is_taken_outside(deploy: Deploy) -> None:
    deployment = deploy()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", deployment.port))
        taken.listen()
        said = deployment("up", "--detach", "--no-build", check=False)
    assert "address already in use" in said or "port is already allocated" in said, said


def test_the_volume_is_too_small(deploy: Deploy) -> None:
    deployment = deploy(PAGEHOLD_SHARED_MEMORY="64m")
    deployment("up", "--detach", "--no-build")
    give_up = time.monotonic() + _SECONDS
    while "does not fit: 0.06 GiB are left (the least of tmpfs" not in deployment.logs("executor"):
        assert time.monotonic() < give_up, deployment.logs()
        time.sleep(0.2)
    # It is started again and again, each time later, and the others wait for the day when it fits.
    assert engine.inspect(deployment.container("executor"))["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    assert deployment.state("kvmanager")["Running"] and deployment.state("frontend")["Running"]


def test_the_gpu_profile_without_a_gpu(deploy: Deploy) -> None:
    if engine.run("docker", "info", "--format", "{{json .Runtimes}}").find("nvidia") >= 0:
        pytest.skip("there may be one")
    deployment = deploy(PAGEHOLD_IMAGES=f"{IMAGES}-cuda", PAGEHOLD_EXECUTOR_VERSION="0")
    # Any image will do: the engine refuses before it starts one.
    engine.run("docker", "tag", f"{IMAGES}/kvmanager:0", f"{IMAGES}-cuda/executor-cuda:0")
    said = deployment("--profile", "gpu", "up", "--detach", "--no-build", "executor-cuda", check=False)
    engine.run("docker", "rmi", f"{IMAGES}-cuda/executor-cuda:0")
    assert 'could not select device driver "nvidia" with capabilities: [[gpu]]' in said


def test_a_port_is_free_again(deploy: Deploy) -> None:
    """What a failed `up` left does not hinder the next."""
    deployment = deploy(PAGEHOLD_PUBLISH=f"127.0.0.1:{free_port()}")
    deployment.address = deployment.environment["PAGEHOLD_PUBLISH"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(deployment.address.rpartition(":")[2])))
        taken.listen()
        deployment("up", "--detach", "--no-build", check=False)
    deployment.up()
