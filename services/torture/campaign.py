"""The run itself: one fault after another while every stream is checked, with looks at rest in between."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from services.torture import faults
from services.torture.checks import Checks
from services.torture.faults import Chooser, Fault, Plan
from services.torture.gaps import Sign, gap
from services.torture.history import Deviation, Kind
from services.torture.injection import Injected, Injector
from services.torture.load import Load
from services.torture.results import Run, Trial
from services.torture.stack import Stack
from services.torture.stream import Phase, Stream

_LOOK_SECONDS: Final = 0.005
_WHOLE_SECONDS: Final = 60.0  # until everything is ready again; a hang is found long before
_FLOW_SECONDS: Final = 4.0  # until every stream has tokens again, where most have: some wait for pages
_STILL_SECONDS: Final = 60.0  # until most have
_BETWEEN_SECONDS: Final = 0.4
_REST_SECONDS: Final = 60.0
_STANDBY_SECONDS: Final = 10.0

_SIGNS: Final = {
    faults.EXECUTOR: Sign.NOTICE,
    faults.FRONTEND: Sign.BREAK,
}


@dataclass(frozen=True, slots=True)
class _Put:
    """A fault that took place, and what there was just before it."""

    injected: Injected
    contexts: list[str]
    standby: bool
    streams: list[Stream]


class Campaign:
    """Everything of one run that is under way."""

    def __init__(
        self, stack: Stack, load: Load, chooser: Chooser, injector: Injector, checks: Checks, run: Run
    ) -> None:
        self._stack = stack
        self._load = load
        self._chooser = chooser
        self._injector = injector
        self._checks = checks
        self._run = run
        self._random = random.Random(f"pace {run.seed}")
        self.deviations: list[Deviation] = []
        self.last: list[str] = []  # the latest faults, for whoever has to find out why

    async def go(self, is_enough: Callable[[], bool], on_trial: Callable[[], None]) -> None:
        """Until it is enough, or something is wrong. on_trial: after each trial."""
        start = time.monotonic()
        before = self._run.seconds
        rested = start
        self._load.start()
        await self._begin()
        while not is_enough() and not self.deviations:
            await self._trial(self._chooser.draw())
            self._run.seconds = before + time.monotonic() - start
            self._load.look()
            self._gather()
            on_trial()
            if not self.deviations and time.monotonic() - rested > _REST_SECONDS:
                await self.rest()
                rested = time.monotonic()
                if not self.deviations:
                    self._load.start()
                    await self._begin()
        self._run.seconds = before + time.monotonic() - start
        if not self.deviations:
            await self.rest(forgotten=True)

    async def _begin(self) -> None:
        """Until streams are under way, and most have tokens."""
        await _until(lambda: self._load.phases == {Phase.DECODE}, _FLOW_SECONDS)

    async def rest(self, forgotten: bool = False) -> None:
        """Lets all streams end, and looks for what is left over."""
        await self._load.pause()
        self._gather()
        if not self.deviations:
            self.deviations += await self._checks.at_rest(forgotten=forgotten)
        self.count()

    async def _trial(self, plan: Plan) -> None:
        if plan.waits and self._stack.standby:
            await _until(self._stack.has_standby, _STANDBY_SECONDS)
        put = [await self._put(plan.fault)]
        if plan.second is not None:
            await asyncio.sleep(plan.after)
            put.append(await self._put(plan.second))
        done = [one for one in put if one is not None]
        if not done:
            self._chooser.missed(plan.fault.row)
            return
        if done[0].injected.row != plan.fault.row:
            self._chooser.missed(plan.fault.row)
        start, streams = done[0].injected.at, done[0].streams
        if not await _until(self._is_whole, _WHOLE_SECONDS):
            what = f"not whole again within {_WHOLE_SECONDS:.0f} s of {self.last[-1]}"
            self.deviations.append(Deviation(Kind.LOST, "stack", what))
            return
        end = await self._flow()
        sign = _SIGNS.get(done[0].injected.row.component, Sign.NONE) if len(done) == 1 else Sign.NONE
        silences = [gap(stream.marks, start, end, sign) for stream in streams]
        gaps = sorted(round(seconds * 1000) for seconds in silences if not math.isnan(seconds))
        for number, one in enumerate(done):
            # Of two faults the silence belongs to both; it is written down once.
            told = gaps if number == len(done) - 1 else []
            row = one.injected.row
            self._run.trials.append(Trial(row, one.contexts, one.standby, len(one.streams), told))
            self._chooser.done(row)
        await asyncio.sleep(self._random.uniform(0, _BETWEEN_SECONDS))

    async def _put(self, fault: Fault) -> _Put | None:
        contexts = sorted(phase.value for phase in self._load.phases)
        if not self._stack.is_whole():
            contexts.append("recovery")
        standby, streams = self._stack.has_standby(), self._load.open
        injected = await self._injector.put(fault)
        if injected is None:
            return None
        row = injected.row
        self.last = [*self.last[-7:], f"{row.component}:{row.point}:{row.action.value}"]
        return _Put(injected, contexts, standby, streams)

    def _is_whole(self) -> bool:
        return self._stack.is_whole() and not any(one.is_stopped for one in self._stack.processes())

    async def _flow(self) -> float:
        """Waits until the streams that had tokens have more; returns when."""
        start = time.monotonic()

        def still() -> tuple[int, int]:
            waiting = [stream for stream in self._load.open if stream.marks.tokens and not stream.is_away]
            return sum(stream.marks.tokens[-1] <= start for stream in waiting), len(waiting)

        def flows() -> bool:
            behind, all_of_them = still()
            return not behind or (2 * behind <= all_of_them and time.monotonic() > start + _FLOW_SECONDS)

        if not await _until(flows, _STILL_SECONDS):
            behind, all_of_them = still()
            what = f"{behind} of {all_of_them} have no token {_STILL_SECONDS:.0f} s after {self.last[-1]}"
            self.deviations.append(Deviation(Kind.LOST, "streams", what))
        return time.monotonic()

    def _gather(self) -> None:
        known = set(self.deviations)
        self.deviations += [one for one in self._load.deviations if one not in known]

    def count(self) -> None:
        """Brings the run's figures up to date."""
        run, counts = self._run, self._load.counts
        run.requests, run.streams_checked, run.tokens_checked = counts.requests, counts.streams, counts.tokens
        run.checks = self._checks.done
        kinds = [one.kind for one in self.deviations]
        run.wrong, run.lost, run.repeated = (kinds.count(one) for one in (Kind.WRONG, Kind.LOST, Kind.REPEATED))
        run.errors, run.leaks = kinds.count(Kind.STATUS), kinds.count(Kind.LEAK)
        if run.trials:
            run.trials[-1].wrong = len(self.deviations)


async def _until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := holds()) and time.monotonic() < deadline:
        await asyncio.sleep(_LOOK_SECONDS)
    return done
