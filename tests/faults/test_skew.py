"""A rolling upgrade and its rollback under load: over gRPC one component may be a version ahead."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from services.cli.await_ready import await_ready
from tests.conftest import START_SECONDS, free_port
from tests.faults.release import HERE, Process, make_next
from tests.faults.streams import Load, mixed, undisturbed

pytestmark = pytest.mark.stack

ORDER = ("kvmanager", "executor", "frontend")


class Cluster:
    """The three components, each of a release of its own, without a supervisor."""

    def __init__(self, folder: Path, hang_seconds: float) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.log = folder / "log"
        self.state_dir = folder / "state"
        self._hang_seconds = hang_seconds
        self.others: list[Process] = []  # whose place another one has
        self.running: dict[str, Process] = {}

    def start(self, component: str, release: Path) -> None:
        flags: dict[str, Any] = {"state_dir": self.state_dir, "hang_seconds": self._hang_seconds}
        if component == "executor":
            flags["kv_memory"] = "512MiB"
        if component == "frontend":
            flags |= {"listen": self.address, "drain_grace": 0}
        self.running[component] = Process(release, component, self.log, **flags)

    def replace(self, component: str, release: Path) -> None:
        assert self.running.pop(component).stop() == 0
        self.start(component, release)

    def stop(self) -> None:
        for process in self.others:
            process.kill()
        for component in reversed(ORDER):
            if component in self.running:
                self.running.pop(component).stop()


@contextmanager
def cluster(release: Path, hang_seconds: float = 10) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="pagehold-test-", dir="/dev/shm") as folder, ExitStack() as stack:
        made = Cluster(Path(folder), hang_seconds)
        stack.callback(made.stop)
        for component in ORDER:
            made.start(component, release)
        assert await_ready(made.address, made.running["frontend"].pid, START_SECONDS), made.log.read_text()[-3000:]
        yield made


async def test_components_are_upgraded_and_rolled_back_under_load(tmp_path: Path) -> None:
    following = make_next(tmp_path / "next")
    with cluster(HERE) as made:
        messages = mixed(tokens=240)
        reference = await undisturbed(made.address, messages)
        load = Load(made.address, messages, resume=True)
        for component in ORDER:
            await load.reach(12)
            made.replace(component, following)
        for component in reversed(ORDER):
            await load.reach(12)
            made.replace(component, HERE)
        assert await load.answers() == reference
        said = made.log.read_text()
    assert "may be one apart only" not in said and "Traceback" not in said, said[-3000:]
