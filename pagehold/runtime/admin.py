"""What an operator or a test asks of one process, over the socket that it has in the state folder."""

from __future__ import annotations

import os
from typing import Any

import grpc
import structlog

from pagehold.admin.v1 import admin_pb2 as admin
from pagehold.admin.v1 import admin_pb2_grpc as admin_grpc
from pagehold.runtime import failpoint

log = structlog.get_logger()


class AdminServicer(admin_grpc.AdminServiceServicer):
    """Only for whoever may enter the state folder: a server that also listens on a port is asked there in vain."""

    async def ArmFailpoints(self, request: admin.ArmFailpointsRequest, context: Any) -> admin.ArmFailpointsResponse:
        await refuse_strangers(context)
        try:
            failpoint.arm(request.specification)
        except failpoint.FailpointSyntaxError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        log.warning("failpoints armed" if request.specification else "failpoints disarmed", armed=request.specification)
        return admin.ArmFailpointsResponse(pid=os.getpid())


async def refuse_strangers(context: Any) -> None:
    """Ends the call of whoever did not come over the socket in the state folder."""
    if not context.peer().startswith("unix:"):
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "only over the socket in the state folder")


def serve_admin(server: grpc.aio.Server, servicer: AdminServicer | None = None) -> None:
    """Adds the service to a server that listens in the state folder."""
    admin_grpc.add_AdminServiceServicer_to_server(servicer or AdminServicer(), server)
