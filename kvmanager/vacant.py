"""What may be done to a state folder only while nobody uses it: its locks are held meanwhile.

A lock that is busy means that a process lives, and nothing is touched. The locks are never waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Final

from kvmanager import pool as pools
from pagehold.runtime.lock import FileLock, LockBusy, is_held
from pagehold.runtime.statedir import StateDir, StateDirError


class Holder(Enum):
    """Who can hold a folder; the value is the name in messages."""

    SUPERVISOR = "a supervisor"
    MANAGER = "a kvmanager"
    EXECUTOR = "an executor"

    def lock(self, state: StateDir) -> Path:
        return {
            Holder.SUPERVISOR: state.supervisor_lock,
            Holder.MANAGER: state.manager_lock,
            Holder.EXECUTOR: state.executor_lock,
        }[self]


WRITERS: Final = (Holder.MANAGER, Holder.EXECUTOR)  # of the shared files
ALL: Final = (Holder.SUPERVISOR, *WRITERS)


def holders_of(state: StateDir) -> tuple[Holder, ...]:
    """Who lives now: a look that takes no lock."""
    return tuple(holder for holder in ALL if is_held(holder.lock(state)))


def is_live(state: StateDir) -> bool:
    """Whether anybody uses the folder, or is there to start somebody who does."""
    return bool(holders_of(state))


class InUse(StateDirError):
    """Somebody lives; the message says who, and what to do."""

    def __init__(self, holder: Holder, message: str) -> None:
        super().__init__(message)
        self.holder = holder


@contextmanager
def vacant(state: StateDir, purpose: str, holders: tuple[Holder, ...] = WRITERS) -> Iterator[None]:
    """Holds the locks of these. purpose: what they must be stopped for. Raises InUse."""
    held: list[FileLock] = []
    try:
        for holder in holders:
            lock = FileLock(holder.lock(state))
            try:
                lock.acquire()
            except LockBusy:
                message = f"{holder.value} still uses {state.root}; stop it before {purpose}"
                raise InUse(holder, message) from None
            held.append(lock)
        yield
    finally:
        for lock in held:
            lock.release()


def discard(state: StateDir) -> None:
    """Drops pool, tables and records. Raises InUse."""
    with vacant(state, "--discard"):
        pools.discard(state)
