"""One supervised process: started, watched by its progress, killed when it hangs, started again.

starting ──ready──▶ running ──exit, or it hangs: SIGKILL──▶ dead ──policy's delay──▶ starting
    │                  └── replace(): SIGTERM, exit ──at once──▶ starting
    └── exit 78 before it was ever ready: the set-up is wrong, and starting again will not help
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Final

import structlog

from pagehold.runtime.process import is_elsewhere
from pagehold.runtime.progress import ProgressView, State, read_progress
from pagehold.runtime.statedir import StateDir
from services.supervisor import priority
from services.supervisor.hang import HangWatch
from services.supervisor.policy import RestartPolicy

log = structlog.get_logger()

EXIT_CONFIG: Final = 78  # EX_CONFIG
_WATCH_SECONDS: Final = 0.1
_SILENT_NS: Final = 60_000_000_000  # until it has written any progress: it only imports before
_START_SECONDS: Final = 0.5  # until a start that the system refused is tried again
_STOP_POLL_SECONDS: Final = 0.01
_HURRY_SECONDS: Final = 2.0

Turn = Callable[["Child"], AbstractAsyncContextManager[None]]


class Child:
    """A component with its parent's eyes on it. Only a parent kills."""

    def __init__(
        self,
        component: str,
        flags: list[str],
        state: StateDir,
        names: tuple[str, ...] = (),
        turn: Turn | None = None,
        is_served: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        names: of the progress files that it may write, the one of a serving process first; default: the component's.
        turn: what is entered around each start.
        is_served: whether another process does this component's work now, so that this one has time.
        """
        self.component = component
        self.on_trial = False  # a restart's new process: its failure is that restart's alone
        self.fatal: int | None = None  # the exit code that ended all attempts
        self.deaths = 0  # that nobody asked for
        self.last_exit: int | None = None
        self._flags = flags
        self._state = state
        self._names = names or (component,)
        self._turn = turn or (lambda child: nullcontext())
        self._is_served = is_served
        self._process: asyncio.subprocess.Process | None = None
        self._started_ns = 0
        self._policy = RestartPolicy()
        self._was_up = False
        self._is_low = False  # in priority
        self._stopping = False
        self._replacing = False
        self._awake = asyncio.Event()  # the policy's delay is over before its time

    @property
    def pid(self) -> int:
        """0 while there is no process."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else 0

    @property
    def name(self) -> str:
        """What it is called in the state folder now."""
        found = self._find()
        return found[0] if found is not None else self._names[0]

    @property
    def progress(self) -> ProgressView | None:
        """None until the present process has written some."""
        found = self._find()
        return found[1] if found is not None else None

    def _find(self) -> tuple[str, ProgressView] | None:
        """The progress file that the present process writes."""
        for name in self._names:
            view = read_progress(self._state.progress(name))
            if view is None or is_elsewhere(view):
                continue
            if view.pid == self.pid and view.started_ns >= self._started_ns:
                return name, view
        return None

    @property
    def is_ready(self) -> bool:
        view = self.progress
        return view is not None and view.state is State.READY

    @property
    def is_up(self) -> bool:
        """Ready, or a standby that could be at once."""
        view = self.progress
        return view is not None and view.state in (State.READY, State.STANDBY)

    async def keep(self) -> None:
        """Runs the component for ever; returns when it was stopped, or when `fatal` is set."""
        while not self._stopping:
            try:
                process = await self._start()
            except OSError as error:
                # No descriptor, no memory, no process to be had: the others run on, and this one comes later.
                log.error("component cannot be started now", name=self.component, reason=error.strerror)
                await asyncio.sleep(_START_SECONDS)
                continue
            if self._stopping:
                process.kill()
            watching = asyncio.create_task(self._watch(process))
            code = await process.wait()
            watching.cancel()
            if self._stopping:
                return
            if self._replacing:
                self._replacing = False
                log.info("component stopped to be replaced", name=self._names[0], exit=_describe(code))
                continue
            self.deaths += 1
            self.last_exit = code
            if code == EXIT_CONFIG and not self._was_up and (self.on_trial or not self._is_served()):
                self.fatal = code
                return
            delay = self._policy.delay(time.monotonic(), self._tokens_committed())
            log.warning("component ended", name=self._names[0], exit=_describe(code), again_in=delay)
            await self._sleep(delay)

    async def _sleep(self, seconds: float) -> None:
        """Or until it is to be replaced at once."""
        self._awake.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._awake.wait()
        except TimeoutError:
            pass

    async def _start(self) -> asyncio.subprocess.Process:
        async with self._turn(self):
            command = [sys.executable, "-m", "services.cli.main", self.component, *self._flags]
            self._started_ns = time.monotonic_ns()
            self._process = await asyncio.create_subprocess_exec(
                *command,
                f"--parent-pid={os.getpid()}",
                stdin=asyncio.subprocess.DEVNULL,
                # A terminal's Ctrl-C is for the supervisor, which stops its children in order. Not a session of its
                # own: where the kernel shares the processors out by sessions (autogroup), a nice value counts only
                # within one, and what loads would take half of what serves.
                process_group=0,
                # Nothing outside the kernels' own pool computes: threads of NumPy's would only be in the way.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        self._is_low = self._is_served() and priority.lower(self._process.pid)
        return self._process

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        hang = HangWatch()
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            view = self.progress
            loading = view is None or view.state is State.STARTING
            if self._is_low and not (loading and self._is_served()):
                self._is_low = False
                priority.restore(process.pid)
            if view is None:
                if time.monotonic_ns() - self._started_ns > _SILENT_NS:
                    log.error("component does not even begin; killing it", name=self._names[0], pid=process.pid)
                    process.kill()
                    return
                continue
            self._was_up = self._was_up or self.is_up
            if hang.look(time.monotonic(), view.missed_ns, self._is_low):
                log.error("component hangs: killing it", name=self.name, pid=process.pid)
                process.kill()
                return

    def _tokens_committed(self) -> tuple[int, int] | None:
        """Changes whenever any executor on this state folder has committed tokens."""
        view = read_progress(self._state.progress("executor"))
        return (view.started_ns, view.committed) if view is not None and view.committed else None

    def kill_standby(self) -> None:
        """It has not taken a lock that was free."""
        view = self.progress
        if view is not None and view.state is State.STANDBY and self._process is not None:
            log.error("standby hangs: it does not take over; killing it", name=self.name, pid=self.pid)
            self._process.kill()

    async def replace(self, seconds: float, hurry: Callable[[], bool]) -> None:
        """Ends the present process as `stop` does; the next one is started at once."""
        if self.pid:
            self._replacing = True
            await self._end(seconds, hurry, signal.SIGTERM)
        self._awake.set()

    async def stop(self, seconds: float, hurry: Callable[[], bool], number: signal.Signals = signal.SIGTERM) -> None:
        """Signal `number`, then SIGKILL after `seconds`, or soon after `hurry()` becomes true."""
        self._stopping = True
        self._awake.set()
        if self.pid:
            await self._end(seconds, hurry, number)

    async def _end(self, seconds: float, hurry: Callable[[], bool], number: signal.Signals) -> None:
        process = self._process
        assert process is not None
        process.send_signal(number)
        deadline = time.monotonic() + seconds
        hurried = False
        while process.returncode is None and time.monotonic() < deadline:
            if hurry() and not hurried:
                hurried = True
                process.terminate()  # a second signal: do not drain
                deadline = min(deadline, time.monotonic() + _HURRY_SECONDS)
            await asyncio.sleep(_STOP_POLL_SECONDS)
        if process.returncode is None:
            log.error("component did not stop in time; killing it", name=self.component)
            process.kill()
            await process.wait()


def _describe(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"code {code}"
