"""One supervised process: started, watched by its progress, killed when it hangs, started again.

starting ──ready──▶ running ──exit, or overdue: SIGKILL──▶ dead ──policy's delay──▶ starting
    └── exit 78 before it was ever ready: the set-up is wrong, and starting again will not help
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Final

import structlog

from pagehold.runtime.progress import ProgressView, State, read_progress
from pagehold.runtime.statedir import StateDir
from services.supervisor.policy import RestartPolicy

log = structlog.get_logger()

EXIT_CONFIG: Final = 78  # EX_CONFIG
_WATCH_SECONDS: Final = 0.1


class Child:
    """A component with its parent's eyes on it. Only a parent kills."""

    def __init__(self, component: str, flags: list[str], state: StateDir) -> None:
        self.component = component
        self.fatal: int | None = None  # the exit code that ended all attempts
        self._flags = flags
        self._state = state
        self._process: asyncio.subprocess.Process | None = None
        self._policy = RestartPolicy()
        self._was_ready = False
        self._stopping = False

    @property
    def pid(self) -> int:
        """0 while there is no process."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else 0

    @property
    def progress(self) -> ProgressView | None:
        """None until the present process has written some."""
        view = read_progress(self._state.progress(self.component))
        return view if view is not None and view.pid == self.pid else None

    @property
    def is_ready(self) -> bool:
        view = self.progress
        return view is not None and view.state is State.READY

    async def keep(self) -> None:
        """Runs the component for ever; returns when it was stopped, or when `fatal` is set."""
        while not self._stopping:
            process = self._process = await self._start()
            watching = asyncio.create_task(self._watch(process))
            code = await process.wait()
            watching.cancel()
            if self._stopping:
                return
            if code == EXIT_CONFIG and not self._was_ready:
                self.fatal = code
                return
            delay = self._policy.delay(time.monotonic(), self._tokens_committed())
            log.warning("component ended", name=self.component, exit=_describe(code), again_in=delay)
            await asyncio.sleep(delay)

    async def _start(self) -> asyncio.subprocess.Process:
        command = [sys.executable, "-m", "services.cli.main", self.component, *self._flags]
        return await asyncio.create_subprocess_exec(
            *command,
            f"--parent-pid={os.getpid()}",
            stdin=asyncio.subprocess.DEVNULL,
            # A terminal's Ctrl-C is for the supervisor, which stops its children in order.
            start_new_session=True,
            # Nothing outside the kernels' own pool computes: threads of NumPy's would only be in the way.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            view = self.progress
            if view is None:
                continue
            self._was_ready = self._was_ready or view.state is State.READY
            if view.overdue:
                log.error("component hangs: its step is overdue; killing it", name=self.component, pid=process.pid)
                process.kill()
                return

    def _tokens_committed(self) -> tuple[int, int] | None:
        """Changes whenever any executor on this state folder has committed tokens."""
        view = read_progress(self._state.progress("executor"))
        return (view.started_ns, view.committed) if view is not None and view.committed else None

    async def stop(self, seconds: float, hurry: Callable[[], bool]) -> None:
        """SIGTERM, then SIGKILL after `seconds`, or soon after `hurry()` becomes true."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        deadline = time.monotonic() + seconds
        hurried = False
        while process.returncode is None and time.monotonic() < deadline:
            if hurry() and not hurried:
                hurried = True
                process.terminate()  # a second SIGTERM: do not drain
                deadline = min(deadline, time.monotonic() + 2)
            await asyncio.sleep(0.01)
        if process.returncode is None:
            log.error("component did not stop in time; killing it", name=self.component)
            process.kill()
            await process.wait()


def _describe(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"code {code}"
