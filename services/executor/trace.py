"""A line a step about where the step thread's time went: for benchmarks, off unless a file is named.

... | answers, waiting | step | answers | step | ...
      a step's total runs from the end of the one before it; after a rest, from its own start

Where the engine runs a step ahead, a line is about the step that is collected, and tells of the turn that did it.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections import deque
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final, Self

import structlog

from services.executor.engine import Engine, Flight
from services.executor.runner.base import StepResult
from services.executor.scheduler import Plan

log = structlog.get_logger()

_MOST_BUFFERED: Final = 1000


@dataclass(frozen=True, slots=True)
class StepLine:
    """One step. Times in microseconds."""

    total_us: int
    run_us: int  # in the runner, beginning a step and waiting for one
    waited_us: int  # before it, while there were sequences to run, but none with the page that it needed
    lacking: int  # sequences that this step left out for lack of a page
    positions: int
    sequences: int

    def to_json(self) -> str:
        # Written by hand: a tenth of what `json.dumps` costs.
        return (
            f'{{"total_us": {self.total_us}, "run_us": {self.run_us}, "waited_us": {self.waited_us}, '
            f'"lacking": {self.lacking}, "positions": {self.positions}, "sequences": {self.sequences}}}\n'
        )

    @classmethod
    def from_json(cls, line: str) -> Self:
        return cls(**json.loads(line))


class StepTrace:
    """The file. Lines are kept until there are many, or there is nothing else to do.

    A disk that is full ends the trace, not the executor.
    """

    def __init__(self, path: Path) -> None:
        """An empty file in place of what is there. Raises OSError."""
        self._file: FileIO | None = path.open("wb", buffering=0)
        self._lines: list[StepLine] = []

    def add(self, line: StepLine) -> None:
        self._lines.append(line)
        if len(self._lines) >= _MOST_BUFFERED:
            self.flush()

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        if not lines or self._file is None:
            return
        data = "".join([line.to_json() for line in lines]).encode()
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            log.error("the step trace ends here: it cannot be written", reason=error.strerror)
            self._file.close()
            self._file = None


class TracedEngine(Engine):
    """An engine that tells of each step how long it took, and how much of that was waiting for pages."""

    def __init__(self, trace: StepTrace, *parts: Any, **options: Any) -> None:
        """parts, options: as for Engine."""
        super().__init__(*parts, **options)
        self._trace = trace
        # CLOCK_MONOTONIC in nanoseconds; 0: there is nothing to be told of.
        self._total_from = 0
        self._waited_from = 0
        self._waited_for = 0
        self._ran_for = 0
        self._lacked: deque[int] = deque()  # for each step under way
        self._collected: tuple[Plan, int] | None = None  # in this turn: the step, and what it lacked

    def step(self) -> bool:
        now = time.perf_counter_ns()
        began = self._total_from or now
        self._ran_for, self._collected = 0, None
        busy = super().step()
        ended = time.perf_counter_ns()
        if busy and self._waited_from:
            self._waited_for, self._waited_from = now - self._waited_from, 0
        if self._collected is not None:
            plan, lacked = self._collected
            times = ((ended - began) // 1000, self._ran_for // 1000, self._waited_for // 1000)
            self._trace.add(StepLine(*times, lacked, plan.positions, len(plan.chunks)))
            self._total_from, self._waited_for = ended, 0
        elif busy:
            self._total_from = began
        elif self._lacking():
            self._total_from, self._waited_from = began, self._waited_from or ended
        else:
            self._total_from = self._waited_from = 0
            self._trace.flush()
        return busy

    def _submit(self, plan: Plan) -> Flight:
        self._lacked.append(self._lacking())
        started = time.perf_counter_ns()
        flight = super()._submit(plan)
        self._ran_for += time.perf_counter_ns() - started
        return flight

    def _collect(self, flight: Flight) -> StepResult:
        self._collected = flight.plan, self._lacked.popleft()
        started = time.perf_counter_ns()
        result = super()._collect(flight)
        self._ran_for += time.perf_counter_ns() - started
        return result

    def _lacking(self) -> int:
        """Sequences that would run, had they the page for it."""
        parked = self.scheduler.parked
        return sum(
            [
                not parked(sequence)
                for sequence in self.scheduler.running
                if sequence.capacity < sequence.known <= sequence.limit and sequence.capacity <= sequence.computed
            ]
        )
