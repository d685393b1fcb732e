"""`pagehold up`: the three components on one machine, and nothing left in shared memory after a clean stop."""

from __future__ import annotations

import asyncio
import sys
from typing import Final

from kvmanager.vacant import discard
from pagehold.runtime import logs
from pagehold.runtime.lock import LOOK_SECONDS, FileLock, LockBusy
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


def _refuse(message: str) -> int:
    print(f"pagehold up: {message}", file=sys.stderr)
    return EXIT_CONFIG


def main(settings: UpSettings) -> int:
    """Runs until SIGTERM or SIGINT. Returns the exit code."""
    logs.configure("supervisor", settings.log_level)
    try:
        state = StateDir.prepare(settings.state_dir)
        lock = FileLock(state.supervisor_lock)
        lock.acquire(patience=LOOK_SECONDS)
        if settings.discard:
            discard(state)
    except LockBusy:
        return _refuse(f"another `pagehold up` runs on {state.root}; stop it or choose another --state-dir")
    except StateDirError as error:
        return _refuse(str(error))
    children = [Child(name, flags_of(settings, kind), state) for name, kind in COMPONENTS.items()]
    ready = f"ready at {settings.listen}"
    code = asyncio.run(Supervisor(children, stop_seconds(settings), ready).run())
    state.remove()
    return code
