"""`pagehold up`: all components on one machine, and nothing left in shared memory after a clean stop."""

from __future__ import annotations

import asyncio
import sys

from kvmanager.vacant import discard
from pagehold.runtime import logs
from pagehold.runtime.lock import LOOK_SECONDS, FileLock, LockBusy
from pagehold.runtime.settings import UpSettings
from pagehold.runtime.statedir import StateDir, StateDirError
from services.supervisor.child import EXIT_CONFIG
from services.supervisor.fleet import COMPONENTS, Fleet
from services.supervisor.port import PortBusy, SharedPort
from services.supervisor.supervisor import Supervisor


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
    try:
        port = SharedPort.take(settings.listen)
        port.check(settings.frontends)
    except PortBusy as error:
        if not state.tables.exists():  # else it was not made by us
            state.remove()
        return _refuse(str(error))
    fleet = Fleet(state, settings, COMPONENTS, settings.frontends, settings.standby, port.is_shared)
    supervisor = Supervisor(fleet, f"ready at {settings.listen}")
    code = asyncio.run(supervisor.run(state.supervisor_socket, settings.metrics_listen))
    state.remove()
    return code
