"""A Docker engine, and one deployment of compose.yaml on it: a project of its own, on a port of its own."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Final

from services.cli.await_ready import await_ready
from tests.conftest import free_port

REPOSITORY: Final = Path(__file__).parents[2]
# Of these tests alone: what somebody has built and runs here is not touched.
IMAGES: Final = "pagehold-test"
TARGETS: Final = {"frontend": "frontend", "kvmanager": "kvmanager", "executor": "executor-cpu"}
START_SECONDS: Final = 120.0
_SECONDS: Final = 120
_POLL_SECONDS: Final = 0.02
_numbers = itertools.count()


def run(*command: str, check: bool = True, seconds: float = _SECONDS, **environment: str) -> str:
    """What it said on both outputs. Raises AssertionError with that when it failed."""
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    assert not check or done.returncode == 0, f"{' '.join(command)}: code {done.returncode}\n{done.stdout}"
    return done.stdout


def why_not() -> str:
    """Why no containers can be tested here; empty when they can."""
    if shutil.which("docker") is None:
        return "no docker command"
    try:
        said = run("docker", "version", "--format", "{{.Server.Version}}", check=False, seconds=20)
    except subprocess.TimeoutExpired:
        return "the Docker engine does not answer"
    if not said.strip().splitlines()[-1:] or not said.strip().splitlines()[-1][:1].isdigit():
        return f"no Docker engine answers: {said.strip()[:200]}"
    if not compose_command():
        return "neither `docker compose` nor docker-compose is installed"
    return ""


def compose_command() -> list[str]:
    """Version 2, else version 1 of the command; empty when there is none."""
    if subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=20).returncode == 0:
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else []


def build(target: str, version: str, context: Path = REPOSITORY) -> None:
    """An image of these tests, of the Dockerfile in `context`."""
    _build(f"{IMAGES}/{target}:{version}", context, "--target", target, "--build-arg", f"VERSION={version}")


def build_prometheus() -> str:
    """Debian's Prometheus on the same base; the image's name."""
    name = f"{IMAGES}/prometheus"
    folder = Path(__file__).parent
    _build(name, folder, "--file", str(folder / "prometheus.Dockerfile"))
    return name


def _build(tag: str, context: Path, *words: str) -> None:
    """The engine's own builder will do, and arguments can come from outside."""
    extra = os.environ.get("PAGEHOLD_BUILD_FLAGS", "").split()
    buildkit = os.environ.get("DOCKER_BUILDKIT", "0")
    run("docker", "build", "--tag", tag, *words, *extra, str(context), seconds=1200, DOCKER_BUILDKIT=buildkit)


def inspect(name: str) -> dict[str, Any]:
    """A container's or image's description."""
    found: list[dict[str, Any]] = json.loads(run("docker", "inspect", name))
    return found[0]


class Deployment:
    """What `docker compose up` makes: `down()` at the end, also after a failure."""

    def __init__(self, **environment: str) -> None:
        """environment: what compose.yaml reads from it."""
        # One after the other, whoever makes it: two of one name would take each other down.
        self.project = f"pagehold-test-{os.getpid()}-{next(_numbers)}"
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.environment = {
            "COMPOSE_PROJECT_NAME": self.project,
            "PAGEHOLD_IMAGES": IMAGES,
            "PAGEHOLD_PUBLISH": self.address,
            **environment,
        }
        self._command = compose_command()

    def __call__(self, *words: str, check: bool = True, seconds: float = _SECONDS, **environment: str) -> str:
        """`docker compose WORDS`."""
        return run(*self._command, *words, check=check, seconds=seconds, **{**self.environment, **environment})

    def up(self, *words: str, **environment: str) -> None:
        """Until a frontend serves."""
        self("up", "--detach", "--no-build", *words, **environment)
        self.await_ready()

    def await_ready(self) -> None:
        assert await_ready(self.address, seconds=START_SECONDS), self.logs()

    def down(self) -> None:
        # A service of a profile that is not named stays, also as an orphan.
        profiles = ("--profile", "cpu", "--profile", "gpu", "--profile", "observability")
        self(*profiles, "down", "--volumes", "--timeout", "5", "--remove-orphans", check=False)
        label = f"label=com.docker.compose.project={self.project}"
        assert not run("docker", "ps", "--all", "--quiet", "--filter", label), f"{self.project} is not gone"

    def logs(self, *services: str) -> str:
        return self("logs", "--no-color", *services, check=False)

    def container(self, service: str) -> str:
        """Its id, whether it runs or not; of the first where there are several."""
        found = self.containers(service)
        assert found, f"{service} has no container"
        return found[0]

    def containers(self, service: str) -> list[str]:
        label = "com.docker.compose"
        filters = [f"label={label}.project={self.project}", f"label={label}.service={service}"]
        said = run("docker", "ps", "--all", "--quiet", *(word for one in filters for word in ("--filter", one)))
        return said.split()

    def state(self, service: str) -> dict[str, Any]:
        """Of the engine: Pid, Running, ExitCode, StartedAt, Health."""
        found: dict[str, Any] = inspect(self.container(service))["State"]
        return found

    def main_pid(self, service: str) -> int:
        """Of the container's first process, as this machine counts; waits for one."""
        give_up = time.monotonic() + START_SECONDS
        while not (pid := int(self.state(service)["Pid"])):
            assert time.monotonic() < give_up, f"{service} was not started again\n{self.logs(service)}"
            time.sleep(_POLL_SECONDS)
        return pid

    def component_pid(self, service: str) -> int:
        """Of the component below `pagehold run`, as this machine counts; waits for one."""
        give_up = time.monotonic() + START_SECONDS
        while not (pid := _component_below(self.main_pid(service), service)):
            assert time.monotonic() < give_up, f"{service} has no process\n{self.logs(service)}"
            time.sleep(_POLL_SECONDS)
        return pid

    def pagehold(self, service: str, *words: str, check: bool = True) -> str:
        """A command in a service's container."""
        return run("docker", "exec", self.container(service), "pagehold", *words, check=check)

    def await_component(self, service: str) -> None:
        """Until its own health check is content."""
        give_up = time.monotonic() + START_SECONDS
        while "ready" not in self.pagehold(service, "health", service, check=False):
            assert time.monotonic() < give_up, self.logs(service)
            time.sleep(0.2)


def _component_below(main: int, component: str) -> int:
    """0: none now."""
    for pid in _descendants(main):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"services.cli.main" in words and component.encode() in words:
            return pid
    return 0


def _descendants(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(one) for task in tasks for one in (task / "children").read_text().split()]
    except OSError:
        return []
    return children + [one for child in children for one in _descendants(child)]


def kill(pid: int) -> None:
    """SIGKILL from the machine, which the engine did not ask for and its restart policy answers."""
    os.kill(pid, signal.SIGKILL)
