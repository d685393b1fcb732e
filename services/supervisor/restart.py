"""A component replaced while streams go on.

frontend   the new one comes first, on the same port; then the old one goes, and its clients with it
executor   the new one loads and waits in the lock; then the old one goes, and the new one has its pages at once
kvmanager  the old one goes, the new one adopts; meanwhile rows have room for the next tokens
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Final

import structlog

from pagehold.supervisor.v1 import supervisor_pb2 as pb
from services.supervisor.child import EXIT_CONFIG, Child

if TYPE_CHECKING:
    from services.supervisor.supervisor import Supervisor

log = structlog.get_logger()

_POLL_SECONDS: Final = 0.02
_READY_SECONDS: Final = 600.0  # a large model takes its time
_MOST_DEATHS: Final = 3  # of a new process, until it is given up


class RestartFailed(Exception):
    """The message is for the operator."""


class RestartBusy(RestartFailed):
    """Another one is under way."""


class Restarter:
    """One restart at a time; it goes on when whoever asked for it is gone."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._fleet = supervisor.fleet
        self._task: asyncio.Task[None] | None = None

    def begin(self, component: str) -> asyncio.Queue[pb.RestartResponse | Exception | None]:
        """What is done, as it is done; None after the last step, or what went wrong. Raises RestartFailed."""
        if not self._fleet.of(component):
            raise RestartFailed(f"this supervisor has no {component or 'such component'}")
        if self._task is not None and not self._task.done():
            raise RestartBusy("another restart is under way; try again when it has ended")
        steps: asyncio.Queue[pb.RestartResponse | Exception | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._run(component, steps))
        return steps

    async def stop(self) -> None:
        """Leaves off where it is."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, component: str, steps: asyncio.Queue[pb.RestartResponse | Exception | None]) -> None:
        log.info("restart asked for", name=component)
        try:
            async for step in self._restart(component):
                log.info(
                    "restart",
                    name=step.instance,
                    stage=pb.RestartStage.Name(step.stage).removeprefix("RESTART_STAGE_").lower(),
                    old_pid=step.old_pid,
                    new_pid=step.new_pid,
                )
                steps.put_nowait(step)
        except RestartFailed as failure:
            log.error("restart failed", name=component, reason=str(failure))
            steps.put_nowait(failure)
        except Exception as fault:
            log.exception("restart failed", name=component)
            steps.put_nowait(fault)
        finally:
            steps.put_nowait(None)

    def _restart(self, component: str) -> AsyncIterator[pb.RestartResponse]:
        if component == "frontend" and self._fleet.shares_port:
            return self._frontends()
        if component == "executor":
            return self._executors()
        return self._in_place(component)

    async def _frontends(self) -> AsyncIterator[pb.RestartResponse]:
        for old in self._fleet.of("frontend"):
            old_name, old_pid = old.name, old.pid
            new = await self._begin("frontend")
            yield _step(new.name, pb.RESTART_STAGE_STARTING, old_pid, new.pid)
            await self._until(new, _is_ready)
            new.on_trial = False
            yield _step(old_name, pb.RESTART_STAGE_STOPPING, old_pid, new.pid)
            # Not SIGTERM: it is to leave its clients time to go over to the new one.
            await self._supervisor.retire(old, signal.SIGUSR1)
            yield _step(new.name, pb.RESTART_STAGE_DONE, old_pid, new.pid)

    async def _executors(self) -> AsyncIterator[pb.RestartResponse]:
        old = next((child for child in self._fleet.of("executor") if child.is_ready), None)
        if old is None:  # nothing is served: there is nothing to wait for
            async for step in self._in_place("executor"):
                yield step
            return
        old_pid = old.pid
        for standby in self._fleet.of("executor"):
            if standby is not old:
                yield _step("executor-standby", pb.RESTART_STAGE_STOPPING, standby.pid, 0)
                await self._supervisor.retire(standby)
        try:
            new = await self._begin("executor")
            yield _step("executor", pb.RESTART_STAGE_STARTING, old_pid, new.pid)
            await self._until(new, _is_up)
            new.on_trial = False
            yield _step("executor", pb.RESTART_STAGE_STOPPING, old_pid, new.pid)
            await self._supervisor.retire(old)
            yield _step("executor", pb.RESTART_STAGE_WAITING, old_pid, new.pid)
            await self._until(new, _is_ready)
        finally:
            if self._fleet.standby and len(self._fleet.of("executor")) < 2 and not self._supervisor.is_stopping:
                self._supervisor.start(self._fleet.make("executor"))
        yield _step("executor", pb.RESTART_STAGE_DONE, old_pid, new.pid)
        for standby in self._fleet.of("executor"):
            if standby is not new:
                await self._until(standby, _is_up)
                yield _step("executor-standby", pb.RESTART_STAGE_DONE, 0, standby.pid)

    async def _in_place(self, component: str) -> AsyncIterator[pb.RestartResponse]:
        for child in self._fleet.of(component):
            old_pid, deaths = child.pid, child.deaths
            yield _step(child.name, pb.RESTART_STAGE_STOPPING, old_pid, 0)
            await self._supervisor.replace(child)
            yield _step(child.name, pb.RESTART_STAGE_WAITING, old_pid, child.pid)
            await self._until(child, _is_next(old_pid), deaths)
            yield _step(child.name, pb.RESTART_STAGE_DONE, old_pid, child.pid)

    async def _begin(self, component: str) -> Child:
        """A new process beside the old one."""
        child = self._fleet.make(component)
        child.on_trial = True
        self._supervisor.start(child)
        await self._until(child, _has_process)
        return child

    async def _until(self, child: Child, reached: Callable[[Child], bool], deaths: int = 0) -> None:
        """Raises RestartFailed; a process on trial is then gone. deaths: of the child before all this."""
        reason = ""
        give_up = time.monotonic() + _READY_SECONDS
        while not reason and not reached(child):
            await asyncio.sleep(_POLL_SECONDS)
            died = child.deaths - deaths
            if died and child.last_exit == EXIT_CONFIG:
                reason = f"the new {child.component} cannot run here; its message is in the log"
            elif died >= _MOST_DEATHS:
                reason = f"the new {child.component} has died {died} times; see the log"
            elif time.monotonic() > give_up:
                reason = f"the new {child.component} is not ready after {_READY_SECONDS:.0f} s; see `pagehold status`"
        if not reason:
            return
        if child.on_trial:
            await self._supervisor.retire(child)
            reason += ". The old one goes on"
        raise RestartFailed(reason)


def _has_process(child: Child) -> bool:
    return bool(child.pid)


def _is_up(child: Child) -> bool:
    return child.is_up


def _is_ready(child: Child) -> bool:
    return child.is_ready


def _is_next(old_pid: int) -> Callable[[Child], bool]:
    return lambda child: child.pid != old_pid and child.is_up


def _step(instance: str, stage: pb.RestartStage, old_pid: int, new_pid: int) -> pb.RestartResponse:
    return pb.RestartResponse(instance=instance, stage=stage, old_pid=old_pid, new_pid=new_pid)
