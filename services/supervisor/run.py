"""`pagehold run COMPONENT`: one component under a supervisor of its own. Shared state stays."""

from __future__ import annotations

import asyncio
import sys

from kvmanager.vacant import discard
from pagehold.runtime import logs
from pagehold.runtime.settings import ComponentSettings, KvManagerSettings
from pagehold.runtime.statedir import StateDir, StateDirError
from services.supervisor.child import EXIT_CONFIG, Child
from services.supervisor.flags import flags_of
from services.supervisor.supervisor import Supervisor
from services.supervisor.up import stop_seconds


def main(component: str, settings: ComponentSettings) -> int:
    """Runs until SIGTERM or SIGINT. Returns the exit code."""
    logs.configure("supervisor", settings.log_level)
    try:
        state = StateDir.prepare(settings.state_dir)
        if isinstance(settings, KvManagerSettings) and settings.discard:
            discard(state)
    except StateDirError as error:
        print(f"pagehold run: {error}", file=sys.stderr)
        return EXIT_CONFIG
    child = Child(component, flags_of(settings, type(settings)), state)
    return asyncio.run(Supervisor([child], stop_seconds(settings), f"{component} is ready").run())
