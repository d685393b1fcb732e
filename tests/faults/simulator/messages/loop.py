"""An event loop whose time is virtual: when nothing is ready it jumps to what comes next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

from tests.faults.simulator.faults import Killed, Violation

T = TypeVar("T")

_MOST_TURNS = 400_000  # of the loop; a schedule that takes more never ends

_current: ContextVar[Process | None] = ContextVar("process", default=None)


class Process:
    """What dies together: the tasks that were started in it. Whoever is dead does nothing any more."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self._loop = loop
        self.name = name
        self.alive = True
        self.tasks: dict[asyncio.Task[Any], None] = {}  # in the order of their start
        self.on_death: list[Callable[[], None]] = []

    def spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        context = copy_context()
        context.run(_current.set, self)
        return self._loop.create_task(coroutine, context=context)

    def serve(self, coroutine: Any) -> None:
        """As `spawn`, for what nobody waits for: what it raises is a fault of the process."""

        def look(task: asyncio.Task[Any]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._loop.found(error)

        self.spawn(coroutine).add_done_callback(look)

    def run(self, act: Callable[..., T], *arguments: Any) -> T:
        """Runs it as the process's own code."""
        context = copy_context()
        context.run(_current.set, self)
        return context.run(act, *arguments)

    def kill(self) -> None:
        """At once: `finally` clauses of its tasks still run, and reach nothing."""
        if not self.alive:
            return
        self.alive = False
        for act in self.on_death:
            act()
        for task in list(self.tasks):
            task.cancel()


def current_process() -> Process | None:
    """Whose code runs now."""
    return _current.get()


class VirtualLoop(asyncio.BaseEventLoop):
    """Single-threaded and deterministic: what runs next depends on the order of calls alone."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = self  # asked to wait for files, of which there are none
        self._now = 1000.0
        self._turns = 0
        self.faults: list[BaseException] = []  # what no task has caught
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._take_fault)

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        self._turns += 1
        if timeout is None or self._turns > _MOST_TURNS:
            raise Violation("the schedule never ends" if timeout is not None else "nothing is left that could happen")
        self._now += timeout
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """At once, on this thread."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _make_task(self, loop: Any, coroutine: Any, context: Context | None = None) -> asyncio.Task[Any]:
        process = context.get(_current) if context is not None else _current.get()
        task = asyncio.Task(coroutine, loop=self, context=context)
        if process is not None:
            process.tasks[task] = None
            task.add_done_callback(lambda done: process.tasks.pop(done, None))
            if not process.alive:
                task.cancel()
        return task

    def _take_fault(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.found(error if error is not None else RuntimeError(context["message"]))

    def found(self, error: BaseException) -> None:
        """No task has caught it."""
        if not isinstance(error, Killed):  # then its process is dead already
            self.faults.append(error)


class VirtualTime:
    """Stands in for the module `time`."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        return self._loop.time()

    def monotonic_ns(self) -> int:
        return int(self._loop.time() * 1e9)
