"""`pagehold restart COMPONENT`: asks the supervisor of a state folder, and says what it does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import grpc

from pagehold.runtime.channel import client_options
from pagehold.runtime.settings import RestartSettings
from pagehold.runtime.statedir import StateDir
from pagehold.supervisor.v1 import supervisor_pb2 as pb
from pagehold.supervisor.v1 import supervisor_pb2_grpc as pb_grpc

_SAID: Final = {
    pb.RESTART_STAGE_STARTING: "starting",
    pb.RESTART_STAGE_STOPPING: "stopping",
    pb.RESTART_STAGE_WAITING: "waiting for the new process",
    pb.RESTART_STAGE_DONE: "ready",
}


def main(settings: RestartSettings) -> int:
    """0 when the new process is ready."""
    state = StateDir(settings.state_dir)
    reason = f"no supervisor of {settings.component}s runs on {state.root}; start one with `pagehold up`"
    for socket in _sockets(state, settings.component):
        try:
            for step in _ask(socket, settings.component):
                print(_line(step), flush=True)
            return 0
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND):
                reason = error.details() or error.code().name
                break
            if error.code() is grpc.StatusCode.UNAVAILABLE and socket.exists():
                reason = f"the supervisor behind {socket} has ended, or ended meanwhile"
        except KeyboardInterrupt:
            print("pagehold restart: the supervisor goes on with it; see `pagehold status`", file=sys.stderr)
            return 130
    print(f"pagehold restart: {reason}", file=sys.stderr)
    return 1


def _sockets(state: StateDir, component: str) -> Iterator[Path]:
    """Where a supervisor of this component may listen."""
    if state.supervisor_socket.exists():
        yield state.supervisor_socket
    yield from sorted(state.root.glob(state.own_supervisor_socket(f"{component}*").name))


def _ask(socket: Path, component: str) -> Iterator[pb.RestartResponse]:
    """Raises grpc.RpcError."""
    channel: Any = grpc.insecure_channel(f"unix:{socket}", options=client_options())
    with channel:
        yield from pb_grpc.SupervisorServiceStub(channel).Restart(pb.RestartRequest(component=component))


def _line(step: pb.RestartResponse) -> str:
    pid = step.old_pid if step.stage == pb.RESTART_STAGE_STOPPING else step.new_pid
    return f"{step.instance}: {_SAID[step.stage]}" + (f" (pid {pid})" if pid else "")
