"""What is known at one moment: processes and records from their files, counters from whoever answers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import grpc

from pagehold.admin.v1 import admin_pb2 as admin
from pagehold.admin.v1 import admin_pb2_grpc as admin_grpc
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.executor.v1 import executor_pb2_grpc as ex_grpc
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from pagehold.runtime.channel import client_options
from pagehold.runtime.statedir import StateDir
from services.cli.components import Component, look
from services.cli.view.outputs import OpenOutputs, Output

_ANSWER_SECONDS: Final = 0.5  # of one process: who is slower is shown as silent


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one process."""

    message: Any  # kv.GetStatsResponse, ex.GetLoadResponse or admin.GetTallyResponse, by the kind of the component
    seconds: float  # until it was there


@dataclass(frozen=True, slots=True)
class Reading:
    """All of it."""

    time: float  # of day
    at_ns: int  # CLOCK_MONOTONIC, before anything was read
    components: list[Component]
    answers: Mapping[str, Answer]  # by name, of those that answered
    outputs: list[Output]


class Reader:
    """Keeps a channel to each process: a new one for each question would cost more than the question."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._outputs = OpenOutputs(state)
        self._channels: dict[str, grpc.Channel] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for channel in self._channels.values():
            channel.close()

    def read(self) -> Reading:
        """Nobody is waited for longer than half a second."""
        now, at_ns = time.time(), time.monotonic_ns()
        components = look(self._state)
        answers = {}
        for one in components:
            if not one.is_down and (answer := self._ask(one)) is not None:
                answers[one.name] = answer
        return Reading(now, at_ns, components, answers, self._outputs.look())

    def _ask(self, one: Component) -> Answer | None:
        match one.kind:
            case "kvmanager":
                socket, method = self._state.kvmanager_socket, _stats
            case "executor" if one.name == "executor":
                socket, method = self._state.executor_socket, _load
            case "frontend":
                socket, method = self._state.socket_of(one.name), _tally
            case _:
                return None  # a standby serves nobody yet
        began = time.perf_counter()
        try:
            return Answer(method(self._channel(socket)), time.perf_counter() - began)
        except grpc.RpcError:
            return None

    def _channel(self, socket: Path) -> grpc.Channel:
        if socket.name not in self._channels:
            self._channels[socket.name] = grpc.insecure_channel(f"unix:{socket}", options=client_options())
        return self._channels[socket.name]


def _stats(channel: grpc.Channel) -> Any:
    return kv_grpc.KvManagerServiceStub(channel).GetStats(kv.GetStatsRequest(), timeout=_ANSWER_SECONDS)


def _load(channel: grpc.Channel) -> Any:
    return ex_grpc.ExecutorServiceStub(channel).GetLoad(ex.GetLoadRequest(), timeout=_ANSWER_SECONDS)


def _tally(channel: grpc.Channel) -> Any:
    return admin_grpc.AdminServiceStub(channel).GetTally(admin.GetTallyRequest(), timeout=_ANSWER_SECONDS)
