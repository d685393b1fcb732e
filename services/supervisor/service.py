"""`pagehold.supervisor.v1.SupervisorService`: what operators ask of a running supervisor."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from pagehold.runtime.channel import server_options
from pagehold.supervisor.v1 import supervisor_pb2 as pb
from pagehold.supervisor.v1 import supervisor_pb2_grpc as pb_grpc
from services.supervisor.restart import RestartBusy, Restarter, RestartFailed

if TYPE_CHECKING:
    from services.supervisor.supervisor import Supervisor

log = structlog.get_logger()


class SupervisorServicer(pb_grpc.SupervisorServiceServicer):
    """One line of answer a step; how it failed is the call's status."""

    def __init__(self, restarter: Restarter) -> None:
        self._restarter = restarter

    async def Restart(self, request: pb.RestartRequest, context: Any) -> None:
        try:
            steps = self._restarter.begin(request.component)
        except RestartFailed as failure:
            busy = isinstance(failure, RestartBusy)
            await context.abort(grpc.StatusCode.ABORTED if busy else grpc.StatusCode.NOT_FOUND, str(failure))
        while (step := await steps.get()) is not None:
            if isinstance(step, RestartFailed):
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(step))
            if isinstance(step, Exception):
                await context.abort(grpc.StatusCode.INTERNAL, "the restart failed; see the supervisor's log")
            await context.write(step)


async def serve(path: Path, supervisor: Supervisor) -> None:
    """Until it is cancelled."""
    if is_served(path):
        log.warning("another supervisor takes the restarts of this state folder", socket=str(path))
        return
    restarter = Restarter(supervisor)
    server = grpc.aio.server(options=server_options())
    pb_grpc.add_SupervisorServiceServicer_to_server(SupervisorServicer(restarter), server)
    path.unlink(missing_ok=True)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        await server.wait_for_termination()
    finally:
        await restarter.stop()
        await server.stop(0)


def is_served(path: Path) -> bool:
    """Whether somebody listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
