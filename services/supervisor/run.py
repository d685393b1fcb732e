"""`pagehold run COMPONENT`: one component under a supervisor of its own. Shared state stays."""

from __future__ import annotations

import asyncio
import sys

from kvmanager.vacant import discard
from pagehold.runtime import logs
from pagehold.runtime.settings import KvManagerSettings, RunExecutorSettings, RunFrontendSettings, SupervisorSettings
from pagehold.runtime.statedir import StateDir, StateDirError, frontend_name
from services.supervisor.child import EXIT_CONFIG
from services.supervisor.fleet import Fleet
from services.supervisor.port import PortBusy, SharedPort
from services.supervisor.supervisor import Supervisor


def main(component: str, settings: SupervisorSettings) -> int:
    """Runs until SIGTERM or SIGINT. Returns the exit code."""
    logs.configure("supervisor", settings.log_level)
    name, port, frontends = component, SharedPort([]), 1
    try:
        state = StateDir.prepare(settings.state_dir)
        if isinstance(settings, KvManagerSettings) and settings.discard:
            discard(state)
        if isinstance(settings, RunFrontendSettings):
            name, port = frontend_name(settings.instance), SharedPort.take(settings.listen)
            frontends = settings.frontends
            port.check(frontends)
    except (StateDirError, PortBusy) as error:
        print(f"pagehold run: {error}", file=sys.stderr)
        return EXIT_CONFIG
    standby = isinstance(settings, RunExecutorSettings) and settings.standby
    fleet = Fleet(state, settings, [component], frontends, standby, port.is_shared)
    supervisor = Supervisor(fleet, f"{component} is ready")
    return asyncio.run(supervisor.run(state.own_supervisor_socket(name), settings.metrics_listen))
