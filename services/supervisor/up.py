"""`pagehold up`: the three components on one machine, and nothing left in shared memory after a clean stop."""

from __future__ import annotations

import asyncio
import sys
from typing import Final

from kvmanager import pool as pools
from pagehold.runtime import logs
from pagehold.runtime.lock import FileLock, LockBusy
from pagehold.runtime.settings import (
    ComponentSettings,
    ExecutorSettings,
    FrontendSettings,
    KvManagerSettings,
    UpSettings,
)
from pagehold.runtime.statedir import StateDir, StateDirError
from services.supervisor.child import EXIT_CONFIG, Child
from services.supervisor.flags import flags_of
from services.supervisor.supervisor import Supervisor

STOP_SECONDS: Final = 10.0

# In the order in which they stop: whoever serves others goes after them.
COMPONENTS: Final[dict[str, type[ComponentSettings]]] = {
    "frontend": FrontendSettings,
    "executor": ExecutorSettings,
    "kvmanager": KvManagerSettings,
}


def stop_seconds(settings: ComponentSettings) -> dict[str, float]:
    """How long each component may take to stop; a frontend drains first."""
    seconds = dict.fromkeys(COMPONENTS, STOP_SECONDS)
    if isinstance(settings, FrontendSettings):
        seconds["frontend"] += settings.drain_grace
    return seconds


def discard(state: StateDir) -> None:
    """Drops pool, tables and records. Raises StateDirError when a manager or an executor still uses them."""
    locks = FileLock(state.manager_lock), FileLock(state.executor_lock)
    try:
        for lock in locks:
            _acquire(lock, f"a component still uses {state.root}; stop it before --discard")
        pools.discard(state)
    finally:
        for lock in locks:
            lock.release()


def _acquire(lock: FileLock, refusal: str) -> None:
    try:
        lock.acquire()
    except LockBusy:
        raise StateDirError(refusal) from None


def main(settings: UpSettings) -> int:
    """Runs until SIGTERM or SIGINT. Returns the exit code."""
    logs.configure("supervisor", settings.log_level)
    try:
        state = StateDir.prepare(settings.state_dir)
        lock = FileLock(state.supervisor_lock)
        _acquire(lock, f"another `pagehold up` runs on {state.root}; stop it or choose another --state-dir")
        if settings.discard:
            discard(state)
    except StateDirError as error:
        print(f"pagehold up: {error}", file=sys.stderr)
        return EXIT_CONFIG
    children = [Child(name, flags_of(settings, kind), state) for name, kind in COMPONENTS.items()]
    ready = f"ready at {settings.listen}"
    code = asyncio.run(Supervisor(children, stop_seconds(settings), ready).run())
    state.remove()
    return code
