"""Keeps children alive until it is told to stop, then stops them in order."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from typing import Final

from services.supervisor.child import Child

_POLL_SECONDS: Final = 0.02
_REPORT_SECONDS: Final = 3.0  # how often it says what it still waits for


class Supervisor:
    """Children are started together and stopped one after the other, in the order given."""

    def __init__(self, children: list[Child], stop_seconds: dict[str, float], ready_message: str) -> None:
        """stop_seconds: how long each component may take to stop."""
        self._children = children
        self._stop_seconds = stop_seconds
        self._ready_message = ready_message
        self._signals = 0
        self._stop = asyncio.Event()

    async def run(self) -> int:
        """Returns the exit code: 0 after SIGTERM or SIGINT, else that of the child that cannot run."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        keeping = [asyncio.create_task(child.keep()) for child in self._children]
        reporting = asyncio.create_task(self._report())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait([stopping, *keeping], return_when=asyncio.FIRST_COMPLETED)
        for task in (reporting, stopping):
            task.cancel()
        for child in self._children:
            await child.stop(self._stop_seconds[child.component], lambda: self._signals > 1)
        for done in await asyncio.gather(*keeping, return_exceptions=True):
            if isinstance(done, BaseException):
                raise done
        return next((child.fatal for child in self._children if child.fatal is not None), 0)

    def _signalled(self) -> None:
        self._signals += 1
        self._stop.set()

    async def _report(self) -> None:
        start = last = time.monotonic()
        while waiting := [child.component for child in self._children if not child.is_ready]:
            await asyncio.sleep(_POLL_SECONDS)
            if time.monotonic() - last > _REPORT_SECONDS:
                last = time.monotonic()
                print(f"pagehold: waiting for {', '.join(waiting)} ({last - start:.0f} s)", file=sys.stderr, flush=True)
        print(f"pagehold: {self._ready_message} after {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
