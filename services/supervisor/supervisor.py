"""Keeps children alive until it is told to stop, then stops them in order."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Final

import structlog

from services.supervisor.child import EXIT_CONFIG, Child
from services.supervisor.fleet import COMPONENTS, Fleet

log = structlog.get_logger()

_REPORT_SECONDS: Final = 3.0  # until it says what it still waits for; each time twice as long
_LONGEST_REPORT_SECONDS: Final = 60.0
_LOOKS: Final = 150  # between two reports: the longer it has waited, the less it looks


class Supervisor:
    """Children are started together and stopped one component after the other."""

    def __init__(self, fleet: Fleet, ready_message: str) -> None:
        self.fleet = fleet
        self._ready_message = ready_message
        self._keeping: dict[Child, asyncio.Task[None]] = {}
        self._signals = 0
        self._stop = asyncio.Event()
        self._code = 0
        self._fault: BaseException | None = None
        self._watched: asyncio.Server | None = None

    async def run(self, socket: Path, metrics_listen: str | None = None) -> int:
        """Returns the exit code: 0 after SIGTERM or SIGINT, else that of the child that cannot run.

        socket: where operators ask for a restart. metrics_listen: HOST:PORT where it is watched.
        """
        if metrics_listen is not None and not await self._publish(metrics_listen):
            return EXIT_CONFIG
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        for child in self.fleet.children:
            self._keep(child)
        others = [asyncio.create_task(self._report()), asyncio.create_task(self._serve(socket))]
        await self._stop.wait()
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for component in COMPONENTS:
            await asyncio.gather(*(self.retire(child) for child in self.fleet.of(component)))
        if self._fault is not None:
            raise self._fault
        return self._code

    async def _serve(self, socket: Path) -> None:
        # Loaded once the children are under way.
        from services.supervisor.service import serve

        try:
            await serve(socket, self)
        except OSError as error:
            log.error("no restarts can be asked for", socket=str(socket), reason=error.strerror)

    async def _publish(self, address: str) -> bool:
        """Before any child starts: whoever watches sees them come."""
        # Loaded only when it is wanted.
        from services.supervisor.watching import listen

        try:
            self._watched = await listen(address, self.fleet)
        except (OSError, ValueError):
            message = f"pagehold: cannot listen on {address}: in use or not allowed; choose another --metrics-listen"
            print(message, file=sys.stderr)
            return False
        return True

    def start(self, child: Child) -> None:
        """One more."""
        self.fleet.children.append(child)
        self._keep(child)

    async def retire(self, child: Child, number: signal.Signals = signal.SIGTERM) -> None:
        """Stops it for good, beginning with signal `number`."""
        await child.stop(self.fleet.stop_seconds(child.component), self.hurries, number)
        if (keeping := self._keeping.get(child)) is not None:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            self._keeping.pop(child, None)
        self.fleet.remove(child)

    async def replace(self, child: Child) -> None:
        """Ends its process; the next one is started at once."""
        await child.replace(self.fleet.stop_seconds(child.component), self.hurries)

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()

    def hurries(self) -> bool:
        """Whether the operator waits no longer."""
        return self._signals > 1

    def _keep(self, child: Child) -> None:
        task = self._keeping[child] = asyncio.create_task(child.keep())
        task.add_done_callback(lambda task: self._ended(child, task))

    def _ended(self, child: Child, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        if (fault := task.exception()) is not None:
            self._fault = fault
        elif child.fatal is None or child.on_trial:
            return
        else:
            self._code = child.fatal
        self._stop.set()

    def _signalled(self) -> None:
        self._signals += 1
        self._stop.set()

    async def _report(self) -> None:
        start = last = time.monotonic()
        seconds = _REPORT_SECONDS
        while waiting := self.fleet.not_ready():
            await asyncio.sleep(seconds / _LOOKS)
            if time.monotonic() - last > seconds:
                last, seconds = time.monotonic(), min(2 * seconds, _LONGEST_REPORT_SECONDS)
                print(f"pagehold: waiting for {', '.join(waiting)} ({last - start:.0f} s)", file=sys.stderr, flush=True)
        print(f"pagehold: {self._ready_message} after {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
