"""What must hold whenever no request is open: nothing contradicts itself, and nothing is left over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from services.cli.manager import NoAnswer, ask
from services.cli.status import collect
from services.torture.history import Deviation, Kind
from services.torture.load import PINS
from services.torture.stack import Stack, resident

_SETTLE_SECONDS: Final = 30.0
_MOST_FDS: Final = 24  # that a process may have more than at the first look: connections come and go
_MOST_GROWTH: Final = 24 << 20  # bytes that a process may grow after the first look, caches included


class Checks:
    """Looks at one stack again and again."""

    def __init__(self, stack: Stack, record_ttl: float) -> None:
        self._stack = stack
        self._record_ttl = record_ttl
        # By name and pid: bytes and descriptors at the first look.
        self._first: dict[tuple[str, int], tuple[int, int]] = {}
        self.memory: list[tuple[float, int, int]] = []  # of the supervisor: when, bytes, descriptors
        self.done = 0

    async def at_rest(self, *, forgotten: bool = False) -> list[Deviation]:
        """No request is open. forgotten: also waits until every record must be gone."""
        found: list[Deviation] = []
        if not await self._settles():
            found.append(_leak("stack", "it did not become whole again with nothing to do"))
            return found
        found += await self._pages(forgotten)
        found += self._files()
        found += self._processes()
        self.done += 1
        return found

    async def _settles(self) -> bool:
        deadline = time.monotonic() + _SETTLE_SECONDS
        while not (self._stack.is_whole() and (not self._stack.standby or self._stack.has_standby())):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.05)
        return True

    async def _pages(self, forgotten: bool) -> list[Deviation]:
        found: list[Deviation] = []
        state = self._stack.state
        for number in range(PINS):
            await self._unpin(f"torture-{number}")
        # Rows close, and records are forgotten, a moment after the last stream has ended.
        wait = self._record_ttl + _SETTLE_SECONDS if forgotten else _SETTLE_SECONDS
        deadline = time.monotonic() + wait
        while True:
            stats = await self._ask(
                lambda stub, seconds: stub.GetStats(kv.GetStatsRequest(), timeout=seconds, wait_for_ready=True)
            )
            held = stats.pages - stats.free_pages
            idle = not stats.rows and not held and not (forgotten and stats.records)
            if idle or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        if stats.rows or held:
            found.append(_leak("pages", f"{held} of {stats.pages} pages are held by {stats.rows} rows of nobody"))
        if forgotten and stats.records:
            found.append(_leak("records", f"{stats.records} are left after their time"))
        if stats.integrity_findings:
            found.append(_leak("kvmanager", f"its own checks found {stats.integrity_findings} contradictions"))
        if unfinished := collect(state)["sequences"]:
            found.append(_leak("records", f"{len(unfinished)} have not ended, such as {unfinished[0]}"))
        report = await self._ask(
            lambda stub, seconds: stub.Fsck(kv.FsckRequest(), timeout=seconds, wait_for_ready=True)
        )
        found += [_leak("fsck", f"{one.kind}: {one.message}") for one in report.findings]
        return found

    def _files(self) -> list[Deviation]:
        state = self._stack.state
        names = {path.name for path in state.root.iterdir()}
        known = {
            state.tables.name,
            state.pool.name,
            state.records.name,
            state.manager_lock.name,
            state.executor_lock.name,
            state.supervisor_lock.name,
        }
        extra = sorted(name for name in names - known if not name.endswith((".sock", ".progress", ".lock")))
        odd = sorted(path.name for path in state.records.iterdir() if path.suffix not in (".req", ".log"))
        return [_leak("state folder", f"{name} is nobody's") for name in (*extra, *odd)]

    def _processes(self) -> list[Deviation]:
        found: list[Deviation] = []
        pids = {"supervisor": self._stack.pid} | {one.instance: one.pid for one in self._stack.processes()}
        for name, pid in pids.items():
            nbytes, fds = resident(pid)
            if name == "supervisor":
                self.memory.append((time.monotonic(), nbytes, fds))
            # A standby that becomes the executor has more from then on.
            first_bytes, first_fds = self._first.setdefault((name, pid), (nbytes, fds))
            if fds > first_fds + _MOST_FDS:
                found.append(_leak(name, f"{fds} open descriptors, {first_fds} at the first look"))
            if nbytes > first_bytes + _MOST_GROWTH:
                found.append(_leak(name, f"{nbytes >> 20} MiB of memory, {first_bytes >> 20} MiB at the first look"))
        return found

    async def _unpin(self, name: str) -> None:
        request = kv.UnpinRequest(tenant="default", name=name)
        await self._ask(lambda stub, seconds: stub.Unpin(request, timeout=seconds, wait_for_ready=True))

    async def _ask(self, call: Callable[[kv_grpc.KvManagerServiceStub, float], Any]) -> Any:
        for left in range(3, -1, -1):
            try:
                return await asyncio.to_thread(ask, self._stack.state, call)
            except NoAnswer:
                if not left:
                    raise
                await asyncio.sleep(0.5)
        raise AssertionError


def _leak(where: str, what: str) -> Deviation:
    return Deviation(Kind.LEAK, where, what)
