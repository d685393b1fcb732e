"""A contestant's worker from start to end, load by load, within bounded time, leaving nothing behind."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

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
        self.end()
        self._root = root
        self._sampler = PeakMemory(root).__enter__()

    def begin(self) -> None:
        """The next part."""
        if self._root:
            self.watch(self._root)

    def end(self) -> int:
        """Nothing is watched until the next part begins; this one's peak in bytes."""
        if self._sampler is None:
            return 0
        sampler, self._sampler = self._sampler, None
        sampler.__exit__(None, None, None)
        return sampler.peak


class _Worker:
    """The process, its notices as they come, and what it may begin."""

    def __init__(self, contestant: Contestant, job: Path, scratch: Path) -> None:
        reading, writing = os.pipe()
        turns, self._turns = os.pipe()
        self.log = scratch / "log"
        try:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    [str(contestant.engine.python), "-m", contestant.engine.module, str(job), str(writing), str(turns)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment(contestant.engine, scratch),
                    pass_fds=[writing, turns],
                    start_new_session=True,  # an interrupt from the terminal comes to us alone
                )
        finally:
            os.close(writing)
            os.close(turns)
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

    def go(self) -> None:
        """It may begin one load."""
        with suppress(BrokenPipeError):  # its notices say how it ended
            os.write(self._turns, b".")

    def dismiss(self) -> None:
        """It need not wait for another load."""
        os.close(self._turns)

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


class Session:
    """A contestant that is up, to be closed and then cleaned up after, whatever happens."""

    def __init__(
        self,
        contestant: Contestant,
        model: Path,
        kv_memory: int,
        warm_up: Path,
        loads: Sequence[tuple[str, Path]],
        most: int,
        timeout: float,
    ) -> None:
        """`loads` are names and request files, in order. most: requests at once, in any of the loads."""
        self.result = Run(load_average=os.getloadavg()[0])
        self._scratch = Path(tempfile.mkdtemp(prefix="pagehold-peers-"))
        self._shared = Path(tempfile.mkdtemp(prefix="pagehold-peers-", dir="/dev/shm"))
        self._timeout = timeout
        self._memory = _Memory()
        self._watch = OtherWork()
        self._over = False
        job = Job(
            dtype=contestant.dtype,
            flags=contestant.flags,
            model=str(model),
            kv_memory=kv_memory,
            most=most,
            loads=tuple(Load(name, str(path), str(self._scratch / f"{name}.traces")) for name, path in loads),
            warm_up=str(warm_up),
            scratch=str(self._scratch),
            shared=str(self._shared),
            spawned=time.monotonic(),
            timeout=timeout,
        )
        self._files = {load.name: Path(load.traces) for load in job.loads}
        jobs.write(self._scratch / "job.json", job)
        try:
            self._worker = _Worker(contestant, self._scratch / "job.json", self._scratch)
        except OSError:
            self.clean()
            raise

    def start(self) -> None:
        """Until it is ready, or has failed."""
        self._follow("start", {Stage.READY})

    def turn(self, load: str) -> None:
        """The next load, which is this one, with nothing else on the machine."""
        if not self._over:
            self._worker.go()
            self._follow(load, {Stage.END, Stage.REFUSED})

    def close(self) -> None:
        """Lets it stop by itself."""
        self._worker.dismiss()
        if not self._over:
            self._follow("its work", set())
        self._memory.end()
        ended = self._worker.end()
        self.result.reason = self.result.reason or ended
        if self.result.reason:
            self.result.log = self._worker.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]

    def interrupt(self) -> None:
        """Makes it stop."""
        self._over = True
        self._worker.interrupt()

    def clean(self) -> None:
        """When none of its processes is left."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        shutil.rmtree(self._shared, ignore_errors=True)

    def _follow(self, what: str, last: set[Stage]) -> None:
        """Takes in the notices until one of `last`, or the end, or until one is too late."""
        while True:
            try:
                # A worker bounds its own requests too and then can say more: it gets a little longer.
                notice = self._worker.next(self._timeout + 5.0)
            except queue.Empty:
                self.result.reason = f"no end of {what} within {self._timeout:.0f} s"
                return self.interrupt()
            if notice is None:
                self._over = True
                return None
            self._take(notice)
            if notice.stage in last or self._over:
                return None

    def _take(self, notice: Notice) -> None:
        result = self.result
        match notice:
            case Notice(stage=Stage.ROOT, pid=pid):
                self._memory.watch(pid)
            case Notice(stage=Stage.READY):
                result.start_seconds, result.version = notice.seconds, notice.version
                result.start_peak = self._memory.end()
            case Notice(stage=Stage.BEGIN):
                self._memory.begin()
                self._watch = OtherWork()
            case Notice(stage=Stage.END, load=load):
                result.others[load] = self._watch.processors()
                # Watching takes processor time, which in a comparison in turns is another engine's from here on.
                result.peaks[load] = self._memory.end()
                result.traces[load] = read_traces(self._files[load])
            case Notice(stage=Stage.REFUSED, load=load):
                result.refused[load] = notice.reason
            case Notice(stage=Stage.FAILED):
                result.reason = notice.reason
                self._over = True


@contextmanager
def ending(sessions: Sequence[Session]) -> Iterator[None]:
    """At the end of the block they are over, and nothing of them is left."""
    try:
        try:
            yield
        except BaseException:
            for session in sessions:
                session.interrupt()
            raise
        finally:
            for session in sessions:
                session.close()
    finally:
        children.end_all()
        for session in sessions:
            session.clean()
