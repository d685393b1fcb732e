"""One run of one contestant: its worker from start to end, within bounded time, leaving nothing behind."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from peers_lib import children
from peers_lib import job as jobs
from peers_lib.contestant import Contestant, environment
from peers_lib.job import Job, Load, Notice, Stage
from peers_lib.memory import PeakMemory
from peers_lib.otherwork import OtherWork
from peers_lib.trace import Trace, read_traces

_STOP_SECONDS: Final = 60.0
_LOG_LINES: Final = 12


@dataclass(slots=True)
class Run:
    """What came of it. `reason` is empty when everything was done."""

    load_average: float  # of the last minute, before the start
    reason: str = ""
    version: str = ""
    start_seconds: float | None = None
    start_peak: int = 0  # bytes, until it was ready
    traces: dict[str, list[Trace]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)  # bytes, while the load ran
    others: dict[str, float] = field(default_factory=dict)  # processors that other work kept busy meanwhile
    refused: dict[str, str] = field(default_factory=dict)  # loads that the engine cannot do, and why
    log: list[str] = field(default_factory=list)  # its last lines, when it failed


class _Memory:
    """One sampler after another over the same tree: a peak for each part of the run."""

    def __init__(self) -> None:
        self._root = 0
        self._sampler: PeakMemory | None = None

    def watch(self, root: int) -> None:
        self._stop()
        self._root = root
        self._sampler = PeakMemory(root).__enter__()

    def turn(self) -> int:
        """Ends a part and begins the next; the ended part's peak in bytes."""
        peak = self._stop()
        if self._root:
            self.watch(self._root)
        return peak

    def _stop(self) -> int:
        if self._sampler is None:
            return 0
        sampler, self._sampler = self._sampler, None
        sampler.__exit__(None, None, None)
        return sampler.peak

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stop()


class _Worker:
    """The process, and its notices as they come."""

    def __init__(self, contestant: Contestant, job: Path, scratch: Path) -> None:
        reading, writing = os.pipe()
        self.log = scratch / "log"
        try:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    [str(contestant.engine.python), "-m", contestant.engine.module, str(job), str(writing)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment(contestant.engine, scratch),
                    pass_fds=[writing],
                    start_new_session=True,  # an interrupt from the terminal comes to us alone
                )
        finally:
            os.close(writing)
        self._notices: queue.SimpleQueue[Notice | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(reading,), name="notices", daemon=True).start()

    def _listen(self, reading: int) -> None:
        with os.fdopen(reading, "rb") as lines:
            for line in lines:
                self._notices.put(Notice.from_line(line))
        self._notices.put(None)

    def next(self, timeout: float) -> Notice | None:
        """None: it has said all. Raises queue.Empty."""
        return self._notices.get(timeout=timeout)

    def end(self) -> str:
        """Lets it stop by itself for a while, then makes it. How it ended if that was not well."""
        try:
            code = self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return "it did not stop"
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}" if code else ""

    def interrupt(self) -> None:
        with suppress(ProcessLookupError):
            self._process.terminate()


def perform(
    contestant: Contestant,
    model: Path,
    kv_memory: int,
    warm_up: Path,
    loads: Sequence[tuple[str, Path]],
    most: int,
    timeout: float,
) -> Run:
    """`loads` are names and request files, in order. Without any, the engine is only started and stopped.

    most: requests at once, in any of the loads.
    """
    result = Run(load_average=os.getloadavg()[0])
    scratch = Path(tempfile.mkdtemp(prefix="pagehold-peers-"))
    shared = Path(tempfile.mkdtemp(prefix="pagehold-peers-", dir="/dev/shm"))
    try:
        job = Job(
            dtype=contestant.dtype,
            flags=contestant.flags,
            model=str(model),
            kv_memory=kv_memory,
            most=most,
            loads=tuple(Load(name, str(path), str(scratch / f"{name}.traces")) for name, path in loads),
            warm_up=str(warm_up),
            scratch=str(scratch),
            shared=str(shared),
            spawned=time.monotonic(),
            timeout=timeout,
        )
        jobs.write(scratch / "job.json", job)
        worker = _Worker(contestant, scratch / "job.json", scratch)
        try:
            with _Memory() as memory:
                _follow(worker, job, memory, result)
        except BaseException:
            worker.interrupt()
            worker.end()
            raise
        ended = worker.end()
        result.reason = result.reason or ended
        if result.reason:
            result.log = worker.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    finally:
        children.end_all()
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(shared, ignore_errors=True)
    return result


def _follow(worker: _Worker, job: Job, memory: _Memory, result: Run) -> None:
    """Takes in the notices until the last, or until one is too late."""
    stage = "start"
    watch = OtherWork()
    files = {load.name: Path(load.traces) for load in job.loads}
    while True:
        try:
            # A worker bounds its own requests too and then can say more: it gets a little longer.
            notice = worker.next(job.timeout + 5.0)
        except queue.Empty:
            result.reason = f"no end of {stage} within {job.timeout:.0f} s"
            worker.interrupt()
            return
        match notice:
            case None:
                return
            case Notice(stage=Stage.ROOT, pid=pid):
                memory.watch(pid)
            case Notice(stage=Stage.READY):
                result.start_seconds, result.version = notice.seconds, notice.version
                result.start_peak = memory.turn()
                stage = "the warm-up"
            case Notice(stage=Stage.BEGIN, load=load):
                memory.turn()
                watch = OtherWork()
                stage = load
            case Notice(stage=Stage.END, load=load):
                result.others[load] = watch.processors()
                result.peaks[load] = memory.turn()
                result.traces[load] = read_traces(files[load])
                stage = "the next load"
            case Notice(stage=Stage.REFUSED, load=load):
                result.refused[load] = notice.reason
            case Notice(stage=Stage.FAILED):
                result.reason = notice.reason
                return
