"""Standard error that never fails and never waits: a line that cannot be written is dropped, and counted.

A full disk, a closed terminal or a pipe that nobody reads is no reason to stop serving. What is dropped is said in
the next line that gets through.
"""

from __future__ import annotations

import io
import os
import socket
import stat
import sys
from collections.abc import Callable
from typing import Final

_FD: Final = 2


def install() -> None:
    """Takes the place of `sys.stderr` in this process; libraries that write to descriptor 2 wait for nobody either."""
    if isinstance(sys.stderr, Stderr):
        return
    mode = os.fstat(_FD).st_mode
    if stat.S_ISSOCK(mode):
        send = socket.socket(fileno=os.dup(_FD)).send
        sys.stderr = Stderr(lambda data: send(data, socket.MSG_DONTWAIT))
        return
    if stat.S_ISFIFO(mode) or os.isatty(_FD):
        _stop_waiting()
    sys.stderr = Stderr(lambda data: os.write(_FD, data))


def _stop_waiting() -> None:
    """A description of its own for the pipe or terminal: others who write there go on as they want."""
    try:
        own = os.open(f"/proc/self/fd/{_FD}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return  # another user's terminal: then it can make us wait
    os.dup2(own, _FD, inheritable=True)
    os.close(own)


class Stderr(io.TextIOBase):
    """A line at a time, each by one write, so that those of several processes do not mix."""

    def __init__(self, write: Callable[[bytes], int]) -> None:
        """write: takes bytes, returns how many were taken; raises OSError."""
        self._write = write
        self._pending = ""
        self._dropped = 0

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return _FD

    def isatty(self) -> bool:
        return os.isatty(_FD)

    def write(self, text: str) -> int:
        self._pending += text
        if self._pending.endswith("\n"):
            self.flush()
        return len(text)

    def flush(self) -> None:
        text, self._pending = self._pending, ""
        if not text:
            return
        missing = f"[{self._dropped} messages could not be written]\n" if self._dropped else ""
        try:
            self._write((missing + text).encode(errors="backslashreplace"))
        except OSError:
            self._dropped += 1
        else:
            self._dropped = 0
