"""The frame around one engine: `python -m peers_lib.engines.NAME JOB NOTICES TURNS`.

Reads the job, starts the engine, warms it up, runs the loads in order and writes a trace file for each. NOTICES and
TURNS are descriptors of pipes: notices go into the one, a byte for each load that may begin comes out of the other.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from peers_lib import job as jobs
from peers_lib import requestfile
from peers_lib.job import Job, Notice, Stage
from peers_lib.requestfile import Request
from peers_lib.trace import Trace

_PR_SET_PDEATHSIG: Final = 1


class EngineError(Exception):
    """The engine cannot be used; the message is the reason, in one line."""


class Engine(Protocol):
    """One engine, in the order of use: `start`, `run` any number of times, `stop`."""

    def start(self, job: Job) -> None:
        """Returns when requests would be answered at once. Raises EngineError."""

    @property
    def root(self) -> int:
        """The process whose tree is the engine; known as soon as `start` has begun."""

    @property
    def started(self) -> float | None:
        """CLOCK_MONOTONIC when the engine's own process began; None: when the worker did."""

    @property
    def version(self) -> str: ...

    def prepare(self, requests: Sequence[Request]) -> bool:
        """Makes room for these requests, outside of what is measured. Whether something was started anew for that.

        Raises EngineError when the engine cannot do them.
        """

    def run(self, requests: Sequence[Request], timeout: float) -> list[Trace]:
        """Each request at its time, to its end. Greedy."""

    def stop(self) -> None:
        """Harmless when `start` has failed."""


def die_with_parent() -> None:
    """A comparison that is killed leaves no engine behind. Also for `preexec_fn` of what a worker starts."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def in_one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, EngineError):
        return lines[0] if lines else "failed without a reason"
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def main(make: Callable[[Callable[[int], None]], Engine]) -> None:
    """`make` gets a function to call with the pid of the engine's root, once it exists."""
    die_with_parent()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    job = jobs.read(Path(sys.argv[1]))
    descriptor, turns = int(sys.argv[2]), int(sys.argv[3])
    # What the engine starts must not hold the pipes open after this process is gone.
    os.set_inheritable(descriptor, False)
    os.set_inheritable(turns, False)

    def tell(notice: Notice) -> None:
        os.write(descriptor, notice.to_line())

    engine = make(lambda pid: tell(Notice(Stage.ROOT, pid=pid)))
    try:
        engine.start(job)
        seconds = time.monotonic() - (job.spawned if engine.started is None else engine.started)
        tell(Notice(Stage.READY, seconds=seconds, version=engine.version))
        is_cold = True
        for load in job.loads:
            if not os.read(turns, 1):
                break  # nobody waits for the others
            requests = requestfile.read(Path(load.requests))
            try:
                is_cold |= engine.prepare(requests)
            except EngineError as error:
                tell(Notice(Stage.REFUSED, load=load.name, reason=in_one_line(error)))
                continue
            if is_cold:
                engine.run(requestfile.read(Path(job.warm_up)), job.timeout)
                is_cold = False
            tell(Notice(Stage.BEGIN, load=load.name))
            traces = engine.run(requests, job.timeout)
            Path(load.traces).write_text("".join(trace.to_json() + "\n" for trace in traces))
            tell(Notice(Stage.END, load=load.name))
    except Exception as error:
        if not isinstance(error, EngineError):
            traceback.print_exc()
        tell(Notice(Stage.FAILED, reason=in_one_line(error)))
        raise SystemExit(1) from None
    finally:
        engine.stop()
