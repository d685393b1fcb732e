"""What becomes of device memory when a process that owns it, or has it mapped, is killed.

The processes are `gpu.victim`'s, which have nothing but the pool and CuPy; each question is asked of both kinds of
pool. A question that breaks off is answered by why.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from gpu.access import access
from gpu.job import Job
from gpu.victim import PATTERN, Died, Victim
from kvmanager.device.memory import DeviceError, Export
from kvmanager.layout import PoolKind

_SPIN_SECONDS: Final = 5.0
_WATCHED_SECONDS: Final = 1.0
_RETURN_SECONDS: Final = 30.0
_FLAT_BYTES: Final = 64 << 20  # what the driver keeps now and then
_AT_ONCE: Final = 8
_CYCLES: Final = 200


@dataclass
class Scene:
    """One kind of pool, and the processes of one question, which end with it."""

    kind: PoolKind
    driver: str
    nbytes: int
    stack: ExitStack

    def process(self, *wrapper: str) -> Victim:
        return self.stack.enter_context(Victim(self.driver, wrapper))

    def owner(self) -> tuple[Victim, Export, int | None]:
        """A process with a pool; the descriptor is closed with the scene."""
        owner = self.process()
        export, fd = owner.ask_with_descriptor("own", self.kind, self.nbytes)
        if fd is not None:
            self.stack.callback(os.close, fd)
        return owner, export, fd

    def attached(self, export: Export, fd: int | None) -> tuple[Victim, int]:
        """A process that has it mapped, and where."""
        process = self.process()
        return process, process.ask("attach", export, fd=fd)


Finding = dict[str, Any]


def owner_killed(scene: Scene) -> Finding:
    """(a) The exporter dies while another process uses the memory."""
    owner, export, fd = scene.owner()
    user, address = scene.attached(export, fd)
    user.ask("write", address, PATTERN)
    user.ask("spin", address + scene.nbytes // 2, _WATCHED_SECONDS)
    owner.kill()
    time.sleep(_WATCHED_SECONDS)
    intact = user.ask("read", address, len(PATTERN)) == PATTERN
    user.ask("write", address, PATTERN[::-1])
    intact &= user.ask("read", address, len(PATTERN)) == PATTERN[::-1]
    return {"answer": "intact, can still be read and written" if intact else "NOT INTACT"}


def last_write(scene: Scene) -> Finding:
    """(b) A process dies inside a kernel that writes: when does the kernel stop?"""
    _, export, fd = scene.owner()
    watcher, watched = scene.attached(export, fd)
    writer, address = scene.attached(export, fd)
    writer.ask("spin", address, _SPIN_SECONDS)
    time.sleep(0.2)
    seconds = writer.kill()
    began, last = time.monotonic(), watcher.ask("read", watched, 8)
    later = 0.0
    while time.monotonic() - began < _WATCHED_SECONDS:
        word = watcher.ask("read", watched, 8)
        if word != last:
            last, later = word, time.monotonic() - began
    return {"answer": f"{later:.3f} s later" if later else "none later", "seconds": seconds}


def memory_returned(scene: Scene) -> Finding:
    """(c) How long until what a killed process had can be had again."""
    here = access(bool(scene.driver))
    before = here.free_bytes()
    owner = scene.process()
    _, fd = owner.ask_with_descriptor("own", scene.kind, scene.nbytes)
    if fd is not None:
        os.close(fd)  # it would keep the memory
    taken = before - here.free_bytes()
    began = time.monotonic()
    owner.kill()
    return _until_returned(here.free_bytes, before, taken, began)


def _until_returned(free: Callable[[], int], before: int, taken: int, began: float) -> Finding:
    while time.monotonic() - began < _RETURN_SECONDS:
        if free() >= before - _FLAT_BYTES:
            seconds = time.monotonic() - began
            return {"answer": f"{taken / 2**20:.0f} MiB after {seconds:.2f} s", "seconds": seconds}
        time.sleep(0.01)
    return {"answer": f"not within {_RETURN_SECONDS:.0f} s"}


def same_pid(scene: Scene) -> Finding:
    """(d) Owner and user have the same PID value, in namespaces of their own."""
    wrapper = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")  # CUDA reads /proc
    owner = scene.process(*wrapper)
    export, fd = owner.ask_with_descriptor("own", scene.kind, scene.nbytes)
    user = scene.process(*wrapper)
    assert owner.pid == user.pid, "unshare gave other PIDs"
    try:
        user.ask("attach", export, fd=fd)
    except Died as error:
        return {"answer": f"refused: {error}"}
    finally:
        if fd is not None:
            os.close(fd)
    return {"answer": "mapped"}


def parked_descriptor(scene: Scene) -> Finding:
    """(e) The owner dies while nobody has the memory mapped; a descriptor of it lies in a third process: this one."""
    owner, export, fd = scene.owner()
    first, address = scene.attached(export, fd)
    first.ask("write", address, PATTERN)
    first.kill()
    owner.kill()
    try:
        heir, found = scene.attached(export, fd)
        intact = heir.ask("read", found, len(PATTERN)) == PATTERN
    except Died as error:
        return {"answer": f"gone: {error}"}
    return {"answer": "intact" if intact else "NOT INTACT"}


def illegal_access(scene: Scene) -> Finding:
    """(f) One process of those that map the pool makes an illegal access."""
    owner, export, fd = scene.owner()
    witness, address = scene.attached(export, fd)
    witness.ask("write", address, PATTERN)
    sinner, _ = scene.attached(export, fd)
    try:
        sinner.ask("fault")
        said = "no error"
    except Died as error:
        said = str(error).splitlines()[0][:80]
    sinner.kill()
    intact = witness.ask("read", address, len(PATTERN)) == PATTERN
    _, later = scene.attached(export, fd)
    del owner, later
    return {"answer": f"{'the pool is unharmed' if intact else 'THE POOL CHANGED'}; the process: {said}"}


def readers_killed(scene: Scene, seconds: float) -> Finding:
    """(g) Readers attach, read and are killed, eight at once; a new one can attach at the end."""
    here = access(bool(scene.driver))
    owner, export, fd = scene.owner()
    writer, address = scene.attached(export, fd)
    writer.ask("write", address, PATTERN)
    writer.kill()
    counts: list[int] = []
    free: list[int] = []
    descriptors = len(os.listdir("/proc/self/fd"))
    end = time.monotonic() + seconds
    while not counts or (sum(counts) < _CYCLES and time.monotonic() < end):
        with ExitStack() as stack:
            readers = [stack.enter_context(Victim(scene.driver)) for _ in range(_AT_ONCE)]
            places = [reader.ask("attach", export, fd=fd) for reader in readers]
            for reader, place in zip(readers, places, strict=True):
                assert reader.ask("read", place, len(PATTERN)) == PATTERN, "the pool changed"
        counts.append(len(readers))
        time.sleep(0.2)
        free.append(here.free_bytes())
    lost = free[0] - free[-1]
    flat = abs(lost) < _FLAT_BYTES and len(os.listdir("/proc/self/fd")) == descriptors
    del owner
    total = sum(counts)
    said = "flat" if flat else f"{lost / 2**20:.0f} MiB lost"
    return {"answer": f"{said} over {total}", "times": float(total)}


QUESTIONS: Final[dict[str, Callable[[Scene], Finding]]] = {
    "owner killed": owner_killed,
    "last write": last_write,
    "memory returned": memory_returned,
    "same PID value": same_pid,
    "parked descriptor": parked_descriptor,
    "illegal access": illegal_access,
}


@contextmanager
def scene(kind: PoolKind, driver: str, nbytes: int) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(kind, driver, nbytes, stack)


def run(job: Job) -> None:
    tiny = job.options.tiny
    driver, nbytes = ("tests.device.fake_memory", 4 << 20) if tiny else ("", 4 << 30)
    for kind in (PoolKind.IPC, PoolKind.VMM):
        name = kind.name.lower()
        for what, ask in QUESTIONS.items():
            job.emit("processes", (what, name), **_answered(ask, kind, driver, nbytes))
        seconds = 2.0 if tiny else job.left() / (2 if kind is PoolKind.IPC else 1) - 30

        def cycles(one: Scene, seconds: float = seconds) -> Finding:
            return readers_killed(one, seconds)

        job.emit("processes", (f"{_CYCLES} readers killed", name), **_answered(cycles, kind, driver, nbytes))


def _answered(ask: Callable[[Scene], Finding], kind: PoolKind, driver: str, nbytes: int) -> Finding:
    try:
        with scene(kind, driver, nbytes) as one:
            return ask(one)
    except (Died, DeviceError, AssertionError, OSError) as error:
        return {"answer": f"broke off: {error}"}
