"""Puts a fault into a running stack, and says when it came."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from dataclasses import dataclass
from typing import Final

from services.torture import faults
from services.torture.faults import Action, Fault, Row, Trigger
from services.torture.load import Load
from services.torture.stack import STANDBY, Process, Stack, is_gone, process_state, send

_LOOK_SECONDS: Final = 0.003
_HIT_SECONDS: Final = 1.2  # for a failpoint that the load comes by
_FORGET_SECONDS: Final = 10.0  # beyond the time that records stay
_START_SECONDS: Final = 6.0  # for one that a process comes by as it starts
_OLDEST_SHARE: Final = 0.5
_THERE_SECONDS: Final = 20.0  # until there is a process to do something to


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that took place."""

    row: Row  # differs from the one planned when its failpoint was not reached
    at: float  # CLOCK_MONOTONIC seconds


class Injector:
    """Signals and failpoints."""

    def __init__(self, stack: Stack, load: Load, seed: int, hang_seconds: float, record_ttl: float) -> None:
        self._stack = stack
        self._load = load
        self._random = random.Random(f"injection {seed}")
        self._hang_seconds = hang_seconds
        self._record_ttl = record_ttl
        self._later: set[asyncio.Task[None]] = set()

    async def put(self, fault: Fault) -> Injected | None:
        """None: there was nobody to do it to."""
        row = fault.row
        if row.point == faults.ANYWHERE:
            return await self._anywhere(row)
        match fault.trigger:
            case Trigger.START:
                return await self._at_start(fault)
            case _:
                return await self._at_point(fault)

    # --- at a random instruction ---

    async def _anywhere(self, row: Row) -> Injected | None:
        match row.component:
            case faults.EVERYTHING:
                return await self._everything(row)
            case faults.ALL:
                return await self._one_after_another(row)
            case faults.BOTH:
                names = [faults.EXECUTOR, faults.MANAGER]
                self._random.shuffle(names)
                at = time.monotonic()
                pids = [await self._find(name) for name in names]
                for found in pids:
                    if found is not None:
                        send(found.pid, signal.SIGKILL)
                return Injected(row, at)
        found = await self._find(row.component)
        if found is None:
            return None
        at = time.monotonic()
        if not send(found.pid, signal.SIGKILL if row.action is Action.KILL else signal.SIGSTOP):
            return None
        if row.action is Action.PAUSE:
            self._after(self._random.uniform(0.05, 0.5) * self._hang_seconds, found.pid, signal.SIGCONT)
        return Injected(row, at)

    async def _one_after_another(self, row: Row) -> Injected:
        at = time.monotonic()
        names = self._stack.instances
        self._random.shuffle(names)
        for name in names:
            if (found := await self._find(name)) is not None:
                send(found.pid, signal.SIGKILL)
            await asyncio.sleep(self._random.uniform(0, 0.3))
        return Injected(row, at)

    async def _everything(self, row: Row) -> Injected:
        """Stopped first, so that no one sees another one die; then only the files are left."""
        at = time.monotonic()
        pids = [self._stack.pid, *(one.pid for one in self._stack.processes())]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                send(pid, number)
        self._stack.kill()
        await self._stack.start()
        return Injected(row, at)

    # --- at a failpoint ---

    async def _at_point(self, fault: Fault) -> Injected | None:
        """Armed in a process that runs; the load, or the death of its peer, makes it come by."""
        row = fault.row
        found = await self._find(row.component)
        if found is None:
            return None
        begin = self._stack.log.stat().st_size
        action = "kill" if row.action is Action.KILL else row.action.value
        pid = await self._stack.arm(found.instance, f"{row.point}={action}@{fault.count}")
        if not pid:
            return None
        if fault.trigger is Trigger.PEER:
            other = await self._find(faults.peer(row.component))
            if other is not None:
                send(other.pid, signal.SIGKILL)
        else:
            self._load.provoke(row.point)
        seconds = _START_SECONDS if fault.trigger is Trigger.PEER else _HIT_SECONDS
        if ".forget." in row.point:
            seconds = self._record_ttl + _FORGET_SECONDS
        if await self._comes(row, pid, begin, seconds):
            at = time.monotonic()
            if row.component == faults.FRONTEND and row.action is Action.ERROR:
                # It may have failed one stream alone, and lives: it is not to fail all that come after.
                await self._stack.arm(found.instance, "")
            return Injected(row, at)
        await self._stack.arm(found.instance, "")
        return None if fault.trigger is Trigger.PEER else await self._instead(row, pid)

    async def _at_start(self, fault: Fault) -> Injected | None:
        """Armed in the process that comes next, by a file that it reads once."""
        row = fault.row
        begin = self._stack.log.stat().st_size
        note = self._stack.state.failpoints(row.component)
        if row.component == faults.EXECUTOR and self._stack.standby:
            # The next executor runs already: it is replaced by one that reads the file.
            await self._until(self._stack.has_standby)
            standby = self._stack.process(STANDBY)
            note.write_text(f"{row.point}={row.action.value}")
            if standby is not None:
                send(standby.pid, signal.SIGKILL)
                await self._until(lambda: is_gone(standby.pid))
            await self._until(self._stack.has_standby)
        else:
            note.write_text(f"{row.point}={row.action.value}")
        found = await self._find(row.component)
        if found is None:
            return None
        at = time.monotonic()
        send(found.pid, signal.SIGKILL)
        await self._until(lambda: is_gone(found.pid))
        hit = await self._successor_comes(row, found.pid, begin)
        note.unlink(missing_ok=True)
        return Injected(row if hit else Row(row.component, faults.ANYWHERE, Action.KILL), at)

    async def _successor_comes(self, row: Row, before: int, begin: int) -> bool:
        """Whether one of the next processes died, stopped or failed at the failpoint."""
        seen: set[int] = set()
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            for name in self._names(row.component):
                found = self._stack.process(name)
                if found is not None and found.pid != before:
                    seen.add(found.pid)
            if row.action is Action.ERROR:
                if self._said(row.point, begin):
                    return True
            elif row.action is Action.STOP:
                if any(process_state(pid) == "T" for pid in seen):
                    return True
            elif any(is_gone(pid) for pid in seen):
                return True
            await asyncio.sleep(_LOOK_SECONDS)
        return False

    async def _comes(self, row: Row, pid: int, begin: int, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            match row.action:
                case Action.KILL if is_gone(pid):
                    return True
                case Action.STOP if process_state(pid) == "T":
                    return True
                case Action.ERROR if self._said(row.point, begin):
                    return True
            if is_gone(pid):
                return False
            await asyncio.sleep(_LOOK_SECONDS)
        return False

    async def _instead(self, row: Row, pid: int) -> Injected | None:
        """The failpoint was not reached: a kill at whatever the process does now."""
        at = time.monotonic()
        if row.action is not Action.KILL or not send(pid, signal.SIGKILL):
            return None
        return Injected(Row(row.component, faults.ANYWHERE, Action.KILL), at)

    # --- parts ---

    def _said(self, point: str, begin: int) -> bool:
        """Whether a component named the failpoint in the log since."""
        with self._stack.log.open("rb") as log:
            log.seek(begin)
            return f"failpoint {point}".encode() in log.read()

    def _names(self, component: str) -> list[str]:
        if component == faults.FRONTEND:
            return [name for name in self._stack.instances if name.startswith(faults.FRONTEND)]
        return [component]

    async def _find(self, component: str) -> Process | None:
        """A process of this component, as soon as there is one that is neither dead nor stopped."""
        deadline = time.monotonic() + _THERE_SECONDS
        while time.monotonic() < deadline:
            there = [found for name in self._names(component) if (found := self._stack.process(name)) is not None]
            if running := [found for found in there if not found.is_stopped]:
                # Streams are rather with the one that has been there longer.
                oldest = min(running, key=lambda found: found.started_ns)
                return oldest if self._random.random() < _OLDEST_SHARE else self._random.choice(running)
            await asyncio.sleep(_LOOK_SECONDS)
        return None

    async def _until(self, holds: object) -> bool:
        assert callable(holds)
        deadline = time.monotonic() + _THERE_SECONDS
        while not (done := bool(holds())) and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)
        return done

    def _after(self, seconds: float, pid: int, number: signal.Signals) -> None:
        async def later() -> None:
            await asyncio.sleep(seconds)
            send(pid, number)

        task = asyncio.create_task(later())
        self._later.add(task)
        task.add_done_callback(self._later.discard)
