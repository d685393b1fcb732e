"""Real stacks for tests: `pagehold up` in a folder and on a port of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from services.cli.await_ready import await_ready

# Torch's threads must not spin for a processor that another process has.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMAND = [sys.executable, "-m", "services.cli.main"]
START_SECONDS = 180.0
STOP_SECONDS = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def to_flags(flags: dict[str, Any]) -> list[str]:
    """`kv_memory="1GiB", prefix_cache=False` to `--kv-memory 1GiB --no-prefix-cache`."""
    words: list[str] = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


class Stack:
    """A running `pagehold up`."""

    def __init__(
        self, folder: Path, flags: dict[str, Any], environment: dict[str, str] | None, stderr: int | None = None
    ) -> None:
        self.state_dir = Path(flags.get("state_dir", folder / "state"))
        self.address = f"127.0.0.1:{free_port()}"
        self.log = folder / "log"
        words = to_flags({"state_dir": self.state_dir, "listen": self.address, "kv_memory": "512MiB", **flags})
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "up", *words],
                stderr=log if stderr is None else stderr,
                stdout=log,
                env={**os.environ, **(environment or {})},
            )
        if not await_ready(self.address, self.process.pid, START_SECONDS):
            self.process.kill()
            pytest.fail(f"the stack did not become ready:\n{self.log.read_text()[-3000:]}")

    def status(self) -> dict[str, Any]:
        command = [*COMMAND, "status", "--json", "--state-dir", str(self.state_dir)]
        found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout)
        return found

    def pids(self) -> dict[str, int]:
        return {name: one["pid"] for name, one in self.status()["components"].items()}

    def kill(self, component: str) -> int:
        """kill -9, as soon as there is one to kill; returns its pid."""
        deadline = time.monotonic() + 10
        while not (pid := self.pids()[component]):
            assert time.monotonic() < deadline, f"{component} was not started again"
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        return pid

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(STOP_SECONDS)


@pytest.fixture
def start_stack() -> Iterator[Callable[..., Stack]]:
    """start_stack(environment=None, stderr=None, state_dir=None, **flags) -> Stack.

    stderr: a descriptor. All are stopped at the end, and must leave nothing.
    """
    yield from _stacks()


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """One for all tests that kill nothing."""
    factory = _stacks()
    start = next(factory)
    # What is made once, such as the converted model, is made by another one: this one is like all later ones.
    start().stop()
    yield start()
    next(factory, None)


@contextmanager
def running_stacks() -> Iterator[Callable[..., Stack]]:
    """`start_stack` outside of pytest."""
    yield from _stacks()


def _stacks() -> Iterator[Callable[..., Stack]]:
    stacks: list[Stack] = []
    with tempfile.TemporaryDirectory(prefix="pagehold-test-", dir="/dev/shm") as root:

        def start(environment: dict[str, str] | None = None, stderr: int | None = None, **flags: Any) -> Stack:
            folder = Path(root) / str(len(stacks))
            folder.mkdir()
            started = Stack(folder, flags, environment, stderr)
            stacks.append(started)
            return started

        try:
            yield start
            for one in stacks:
                assert one.stop() == 0, one.log.read_text()[-3000:]
                assert not one.state_dir.exists(), "a clean stop leaves nothing in shared memory"
        finally:
            for one in stacks:
                if one.process.poll() is None:
                    one.process.kill()  # its children die with it
                    one.process.wait()
