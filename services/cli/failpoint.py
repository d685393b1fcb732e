"""`pagehold failpoint`: lists the places where a fault can be put, and puts some into a process that runs."""

from __future__ import annotations

import sys
from typing import Any

import grpc

from pagehold.admin.v1 import admin_pb2 as admin
from pagehold.admin.v1 import admin_pb2_grpc as admin_grpc
from pagehold.runtime.channel import client_options
from pagehold.runtime.failpoint import POINTS
from pagehold.runtime.settings import FailpointArmSettings, FailpointListSettings
from pagehold.runtime.statedir import StateDir

_ANSWER_SECONDS = 5.0
_HEAD = """# Failpoints

Named places in the product where a fault can be put between two steps: `kill` (SIGKILL to itself), `stop`
(SIGSTOP), `delay:MS`, or `error` (an exception). Off unless armed; then one look-up each.

- for every life of a process: `PAGEHOLD_FAILPOINTS="NAME=kill|stop|delay:MS|error[@COUNT];…"` in its environment,
  or `--failpoints`; `@3` lets the first two hits pass;
- for the process that runs: `pagehold failpoint arm INSTANCE "NAME=…"`, where an instance is `frontend`,
  `frontend-2`, `kvmanager` or `executor`; an empty text disarms;
- for the next life alone: the same text in `<component>.failpoints` in the state folder, read once and removed.

`pagehold torture` puts faults at all of them: [crash-matrix.md](crash-matrix.md). Made by
`pagehold failpoint list --markdown`.

| name | between |
|---|---|
"""


def list_points(settings: FailpointListSettings) -> int:
    """Returns the exit code."""
    if settings.markdown:
        print(markdown(), end="")
    else:
        width = max(map(len, POINTS)) + 2
        for name, between in POINTS.items():
            print(f"{name:<{width}}{between}")
    return 0


def markdown() -> str:
    """docs/failpoints.md."""
    return _HEAD + "".join(f"| `{name}` | {between} |\n" for name, between in POINTS.items())


def arm(settings: FailpointArmSettings) -> int:
    """Returns the exit code."""
    path = StateDir(settings.state_dir).root / f"{settings.instance}.sock"
    channel: Any = grpc.insecure_channel(f"unix:{path}", options=client_options())
    with channel:
        try:
            reply = admin_grpc.AdminServiceStub(channel).ArmFailpoints(
                admin.ArmFailpointsRequest(specification=settings.specification), timeout=_ANSWER_SECONDS
            )
        except grpc.RpcError as error:
            known = error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED)
            said = error.details() if known else f"no {settings.instance} answers at {path}; see `pagehold status`"
            print(f"pagehold failpoint: {said}", file=sys.stderr)
            return 1
    print(f"{'armed' if settings.specification else 'disarmed'}: {settings.instance}, pid {reply.pid}")
    return 0
