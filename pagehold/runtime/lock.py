"""A file lock held for life: holding it proves that the earlier holder is dead."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Final

LOOK_SECONDS: Final = 0.1  # far longer than a look takes
_TRY_SECONDS: Final = 0.005


class LockBusy(Exception):
    """Another live process holds the lock."""


class FileLock:
    """flock on a path, released only by the holder's death or `release`.

    The descriptor is close-on-exec, and holders never fork without exec, so no child can
    keep the lock alive. After locking, the path is checked to still name the locked inode:
    a lock on an unlinked file proves nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def acquire(self, wait: bool = False, patience: float = 0.0) -> None:
        """Raises LockBusy when another process holds it and `wait` is false.

        patience: seconds of trying again, for `is_held` shares a free lock for an instant.
        """
        deadline = time.monotonic() + patience
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(fd)
                if time.monotonic() >= deadline:
                    raise LockBusy(str(self._path)) from error
                time.sleep(_TRY_SECONDS)
                continue
            except BaseException:
                os.close(fd)
                raise
            if self._names_inode(fd):
                self._fd = fd
                return
            os.close(fd)

    def _names_inode(self, fd: int) -> bool:
        try:
            named = os.stat(self._path)
        except FileNotFoundError:
            return False
        held = os.fstat(fd)
        return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)

    def write_id(self, identity: bytes) -> None:
        """Publishes the holder's 128-bit id in the file."""
        os.pwrite(self._fd, identity, 0)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_held(path: Path) -> bool:
    """Whether a live process holds the lock: a look that waits for nobody, and makes no file.

    A lock that nobody holds is shared for an instant, so that two who look do not take each other for a holder.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def read_id(path: Path) -> bytes:
    """The id that the last holder wrote; empty when there is none."""
    try:
        with path.open("rb") as file:
            return file.read(16)
    except FileNotFoundError:
        return b""
