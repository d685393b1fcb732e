"""Who is the executor: the holder of executor.lock. Whoever finds it held is a standby until it is free.

    standby ──the lock is free: the former holder is dead──▶ executor

Each of the two has a progress file of its own, so that a standby never writes into the words of the
executor that still runs. A standby that starts at the same time as another overwrites only its like.
"""

from __future__ import annotations

import asyncio
import secrets
import threading

from pagehold.runtime import failpoint
from pagehold.runtime.heartbeat import Heartbeat
from pagehold.runtime.lock import FileLock, LockBusy
from pagehold.runtime.progress import Progress, State
from pagehold.runtime.statedir import StateDir


class Tenure:
    """The lock, held for life, and the progress file that goes with it."""

    def __init__(self, state: StateDir, hang_seconds: float = 10.0) -> None:
        """Takes the lock if it is free. Nothing shared but the progress file is mapped before it is held."""
        self._state = state
        self._hang_seconds = hang_seconds
        self._lock = FileLock(state.executor_lock)
        self.id = b""  # the 128 bits in executor.lock, once it is held
        try:
            self._lock.acquire()
        except LockBusy:
            self._start("executor-standby")
        else:
            self._begin()

    @property
    def is_held(self) -> bool:
        return bool(self.id)

    async def wait(self) -> None:
        """Until the lock is held. May be cancelled; then the process must end, for it can still get the lock."""
        if self.is_held:
            return
        self.progress.set_state(State.STANDBY)
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[None] = loop.create_future()

        def settle(error: OSError | None) -> None:
            if outcome.done():
                return
            if error is None:
                outcome.set_result(None)
            else:
                outcome.set_exception(error)

        def block() -> None:
            error = None
            try:
                self._lock.acquire(wait=True)
            except OSError as found:
                error = found
            try:
                loop.call_soon_threadsafe(settle, error)
            except RuntimeError:
                pass  # the loop is closed: the process is ending, and the lock with it

        # A daemon: a process that is told to stop must not wait for a lock that may be held for days.
        threading.Thread(target=block, name="lock", daemon=True).start()
        await outcome
        self._heart.end()
        self.progress.set_state(State.DOWN)
        self._begin()

    def _begin(self) -> None:
        self._start("executor")
        failpoint.hit("executor.lock.held")
        self.id = secrets.token_bytes(16)
        self._lock.write_id(self.id)

    def _start(self, name: str) -> None:
        self.progress = Progress(self._state.progress(name))
        self._heart = Heartbeat(self.progress, self._hang_seconds)
