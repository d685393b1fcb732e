"""An executor with the manager's core in its own process, without gRPC between them: only for comparison.

`python joined_executor.py FLAGS OF pagehold executor`. It gives up what the two processes are for: when it dies, so do
the page tables' only reader and writer, at once. Calls are answered in the thread that makes them, under one lock.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

from kvmanager.service import Manager
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime import descriptors
from pagehold.runtime.process import die_with_parent
from pagehold.runtime.settings import ExecutorSettings, KvManagerSettings
from pagehold.runtime.statedir import StateDir
from services.executor import main as executor
from services.executor.kv_link import Attach, OnAttach, OnFatal, OnReply

_SWEEP_SECONDS: Final = 0.05  # as the manager's process does


class JoinedLink:
    """In place of `KvLink`: the same callbacks, and a manager that is called instead of written to."""

    def __init__(
        self,
        manager: Manager,
        address: str,
        attach: Attach,
        on_attach: OnAttach,
        on_reply: OnReply,
        on_fatal: OnFatal,
        hang_seconds: float = 10.0,
    ) -> None:
        """All but `manager` as for KvLink."""
        self._manager = manager
        self._attach = attach
        self._on_attach = on_attach
        self._on_reply = on_reply
        self._on_fatal = on_fatal
        self._lock = threading.Lock()

    def send(self, calls: list[kv.Call]) -> None:
        """Answers them at once."""
        with self._lock:
            answered = [(call, self._manager.call(call)) for call in calls]
        for call, reply in answered:
            self._on_reply(call, reply)

    async def run(self) -> None:
        """Attaches, then does between calls what the manager's process does. Returns only when it is refused."""
        request = await self._attach()
        with self._lock:
            reply = self._manager.attach(request)
        if reply.HasField("error"):
            self._on_fatal(reply.error)
            return
        self._on_attach(reply.attach)
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            with self._lock:
                self._manager.sweep()


class _AtOnce:
    """In place of the event loop where the engine hands its calls over: they are made in the step thread."""

    def call_soon_threadsafe(self, call: Callable[..., object], *arguments: object) -> None:
        call(*arguments)


class JoinedExecutor(executor._Executor):
    """The executor, but for the way of its calls."""

    def _make_engine(self, link: Any, loop: Any, progress: Any) -> Any:
        return super()._make_engine(link, _AtOnce(), progress)  # type: ignore[arg-type]


def main(arguments: list[str]) -> int:
    """Runs until SIGTERM. Returns the exit code."""
    descriptors.prepare()
    settings = ExecutorSettings(_cli_parse_args=arguments)  # type: ignore[call-arg]
    if settings.parent_pid:
        die_with_parent(settings.parent_pid)
    defaults = KvManagerSettings()
    state = StateDir.prepare(settings.state_dir)
    manager = Manager(state, defaults.record_quota, defaults.record_ttl, lambda name: None)

    def link(*parts: Any) -> JoinedLink:
        return JoinedLink(manager, *parts)

    executor.KvLink = link  # type: ignore[misc,assignment]
    executor._Executor = JoinedExecutor  # type: ignore[misc]
    return executor.main(settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
