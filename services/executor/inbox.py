"""What reaches the step thread from the event loop: one queue, drained between steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.kv.v1 import kv_manager_pb2 as kv
from services.executor.publisher import Connection


@dataclass(frozen=True, slots=True)
class Connected:
    connection: Connection


@dataclass(frozen=True, slots=True)
class Disconnected:
    connection: Connection


@dataclass(frozen=True, slots=True)
class FromFrontend:
    connection: Connection
    message: ex.ConnectRequest


@dataclass(frozen=True, slots=True)
class Attached:
    """The manager took this executor, for the first time or after a restart of its own."""

    response: kv.AttachResponse
    open_pool: Callable[[], None] = lambda: None  # comes before anything that touches pages


@dataclass(frozen=True, slots=True)
class PoolLost:
    """The manager has lost the memory that is mapped: nothing of it counts, and nothing may use it any more."""

    let_go: Callable[[], None]  # is called once that is so


@dataclass(frozen=True, slots=True)
class Replied:
    call: kv.Call
    reply: kv.Reply


@dataclass(frozen=True, slots=True)
class Wake:
    """Something that the step thread waits for may have changed."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish the step in flight and return."""


Event = Connected | Disconnected | FromFrontend | Attached | PoolLost | Replied | Wake | Stop


class Inbox:
    """Any thread puts; the step thread takes."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._ready = threading.Event()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._ready.set()

    def take(self, timeout: float | None) -> list[Event]:
        """All that is there; waits up to `timeout` seconds for the first. 0: does not wait."""
        if timeout != 0 and not self._events:
            self._ready.wait(timeout)
        self._ready.clear()
        events: list[Event] = []
        while self._events:
            events.append(self._events.popleft())
        return events
