"""`<component>.progress`: what a supervisor and `pagehold status` watch, without asking anybody.

Ten u64 words, written by the component alone; each changes by one aligned store. Without numpy, which takes
longer to import than what only looks here takes to run.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

_WORDS: Final = 10
_PID, _STATE, _TURN, _DEADLINE, _STARTED, _COMMITTED, _FINDINGS, _ALIVE, _NAMESPACE, _STARTS = range(_WORDS)
_LEAST_WORDS: Final = 8  # of a release that said neither in which namespace its pid counts nor how many came before


class State(IntEnum):
    DOWN = 0
    STARTING = 1
    READY = 2
    DRAINING = 3
    STANDBY = 4
    STALLED = 5

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class ProgressView:
    pid: int
    state: State
    turn: int
    deadline_ns: int  # CLOCK_MONOTONIC, of the next turn; 0: idle
    started_ns: int  # CLOCK_MONOTONIC
    committed: int  # tokens committed in this life; only the executor counts
    findings: int = 0  # of checks that the component makes of itself; only the manager does
    alive_until_ns: int = 0  # CLOCK_MONOTONIC, of the next heartbeat; 0: it has none
    pid_namespace: int = 0  # in which the pid counts, an inode; 0: the reader's own
    starts: int = 0  # processes of this name in this state folder so far, this one among them; 0: it did not say

    @property
    def missed_ns(self) -> int:
        """The deadline that is over, of the turn or of the heartbeat; 0: none is."""
        now = time.monotonic_ns()
        return next((deadline for deadline in (self.deadline_ns, self.alive_until_ns) if 0 < deadline < now), 0)

    @property
    def overdue(self) -> bool:
        return self.missed_ns != 0


class Progress:
    """The component's own side."""

    def __init__(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, _WORDS * 8)
            self._map = mmap.mmap(fd, _WORDS * 8)
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("Q")
        self._words[_STATE] = int(State.DOWN)
        self._words[_DEADLINE] = 0
        self._words[_TURN] = 0
        self._words[_COMMITTED] = 0
        self._words[_FINDINGS] = 0
        self._words[_ALIVE] = 0
        self._words[_STARTED] = time.monotonic_ns()
        self._words[_NAMESPACE] = pid_namespace()
        self._words[_STARTS] += 1
        self._words[_PID] = os.getpid()
        self._words[_STATE] = int(State.STARTING)

    def set_state(self, state: State) -> None:
        self._words[_STATE] = int(state)

    def set_findings(self, count: int) -> None:
        self._words[_FINDINGS] = count

    def beat(self, seconds: float) -> None:
        """The process runs. Without another beat within `seconds` it counts as hung."""
        self._words[_ALIVE] = time.monotonic_ns() + int(seconds * 1e9)

    def end_beats(self) -> None:
        self._words[_ALIVE] = 0

    def begin_turn(self, seconds: float) -> None:
        """A turn that must end within `seconds`, else the component counts as hung."""
        self._words[_DEADLINE] = time.monotonic_ns() + int(seconds * 1e9)

    def end_turn(self, committed: int = 0, next_within: float = 0.0) -> None:
        """The turn is done. next_within: seconds until the next one begins, else it hangs; 0: no matter when."""
        if committed:
            self._words[_COMMITTED] += committed
        self._words[_TURN] += 1
        self._words[_DEADLINE] = time.monotonic_ns() + int(next_within * 1e9) if next_within else 0


def read_progress(path: Path) -> ProgressView | None:
    """None when the component never ran here, or the file is damaged or cannot be opened now.

    A dead pid is the caller's to find out.
    """
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    count = min(len(raw) // 8, _WORDS)
    if count < _LEAST_WORDS:
        return None
    pid, state, turn, deadline, started, committed, findings, alive, *later = struct.unpack_from(f"={count}Q", raw)
    if state >= len(State):
        return None
    return ProgressView(pid, State(state), turn, deadline, started, committed, findings, alive, *later)


def pid_namespace() -> int:
    """Of this process: containers that share a state folder have pids of their own."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
