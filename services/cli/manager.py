"""Operators' calls to a running manager, over its socket in the state folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import grpc

from kvmanager.vacant import is_live
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from pagehold.runtime.channel import client_options
from pagehold.runtime.statedir import StateDir

Answer = TypeVar("Answer")
ANSWER_SECONDS: Final = 10.0


class NoAnswer(Exception):
    """The message is for the person at the terminal."""


def ask(
    state: StateDir, call: Callable[[kv_grpc.KvManagerServiceStub, float], Answer], seconds: float = ANSWER_SECONDS
) -> Answer:
    """call(stub, seconds): makes the call; a manager that is being started again is waited for. Raises NoAnswer."""
    if not is_live(state):
        raise NoAnswer(f"no kvmanager runs on {state.root}; start one with `pagehold up`, or name another --state-dir")
    channel: Any = grpc.insecure_channel(f"unix:{state.kvmanager_socket}", options=client_options())
    with channel:
        try:
            return call(kv_grpc.KvManagerServiceStub(channel), seconds)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                said = f"no kvmanager of {state.root} answered within {seconds:.0f} s; see `pagehold status`"
                raise NoAnswer(said) from error
            raise NoAnswer(f"the kvmanager of {state.root} failed: {error.details()}") from error
