"""A stack of its own: `pagehold up` in a folder and on a port that nobody else has, and its processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from pagehold.admin.v1 import admin_pb2 as admin
from pagehold.admin.v1 import admin_pb2_grpc as admin_grpc
from pagehold.runtime.process import is_alive
from pagehold.runtime.progress import State, read_progress
from pagehold.runtime.statedir import StateDir, frontend_name
from services.cli.await_ready import await_ready

START_SECONDS: Final = 300.0
STOP_SECONDS: Final = 60.0
STANDBY: Final = "executor-standby"


class StackFailed(Exception):
    """The stack did not start or stop; the message says what to read."""


@dataclass(frozen=True, slots=True)
class Process:
    """A component's process, as its progress file names it."""

    instance: str
    pid: int
    state: State
    started_ns: int  # CLOCK_MONOTONIC

    @property
    def is_stopped(self) -> bool:
        """By SIGSTOP."""
        return process_state(self.pid) == "T"


def process_state(pid: int) -> str:
    """As in /proc: R, S, D, T, Z; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def is_gone(pid: int) -> bool:
    return process_state(pid) in ("", "Z", "X")


class Stack:
    """`pagehold up`, started again by `start` with the same flags whenever it is gone."""

    def __init__(self, root: Path, flags: list[str], frontends: int, standby: bool) -> None:
        """root: holds the state folder and the log. flags: of `up`, besides folder and address."""
        self.address = f"127.0.0.1:{_free_port()}"
        self.state = StateDir(root / "state")
        self.log = root / "log"
        self.frontends = frontends
        self.standby = standby
        self._flags = [*flags, f"--state-dir={self.state.root}", f"--listen={self.address}"]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The supervisor's."""
        return self._process.pid if self._process is not None else 0

    @property
    def instances(self) -> list[str]:
        """Names of all that must run, the standby apart."""
        return [*(frontend_name(number) for number in range(1, self.frontends + 1)), "kvmanager", "executor"]

    async def start(self) -> None:
        """Raises StackFailed."""
        # From this very thread: the death of a thread counts as that of the parent.
        command = [sys.executable, "-m", "services.cli.main", "up", f"--parent-pid={os.getpid()}", *self._flags]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if not await asyncio.to_thread(await_ready, self.address, self._process.pid, START_SECONDS):
            raise StackFailed(f"the stack did not become ready; read {self.log}")

    def stop(self) -> int:
        """SIGTERM, as an operator would. Returns the exit code; kills what does not stop."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.terminate()
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise StackFailed(f"the stack did not stop within {STOP_SECONDS:.0f} s; read {self.log}") from None

    def kill(self) -> None:
        """The supervisor; its children die with it."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def process(self, instance: str) -> Process | None:
        """None: none is alive."""
        view = read_progress(self.state.progress(instance))
        return Process(instance, view.pid, view.state, view.started_ns) if view is not None and is_alive(view) else None

    def processes(self) -> list[Process]:
        """All that are alive, the standby among them."""
        names = [*self.instances, *([STANDBY] if self.standby else [])]
        return [found for name in names if (found := self.process(name)) is not None]

    def is_whole(self) -> bool:
        """Whether everything that serves is ready. The standby may still load."""
        found = {one.instance: one for one in self.processes()}
        return all(name in found and found[name].state is State.READY for name in self.instances)

    def has_standby(self) -> bool:
        one = self.process(STANDBY) if self.standby else None
        return one is not None and one.state is State.STANDBY and not one.is_stopped

    async def arm(self, instance: str, specification: str) -> int:
        """In the process that answers on the instance's socket; returns its pid, 0 when none answers."""
        path = self.state.root / f"{instance}.sock"
        async with grpc.aio.insecure_channel(
            f"unix:{path}", options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            stub: Any = admin_grpc.AdminServiceStub(channel)
            try:
                reply = await stub.ArmFailpoints(admin.ArmFailpointsRequest(specification=specification), timeout=1)
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    return 0  # dead, stopped, or not there yet
                raise
            return int(reply.pid)


def send(pid: int, number: signal.Signals) -> bool:
    """False when the process is gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def resident(pid: int) -> tuple[int, int]:
    """Bytes of its own memory, and open file descriptors. Zeros for a process that is gone.

    Without mapped files: pages and tables, of which a process touches more and more, are everybody's.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        own = next((line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")), "0")
        return int(own) * 1024, len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0, 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
