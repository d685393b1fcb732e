"""Processes that a run started, and the end of all of them."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from contextlib import suppress
from typing import Final

from peers_lib.memory import descendants

_PR_SET_CHILD_SUBREAPER: Final = 36
_KILL_SECONDS: Final = 10.0


def adopt_orphans() -> None:
    """From now on a grandchild whose parent dies becomes a child of this process, so that none is lost sight of."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_all() -> None:
    """Kills and reaps everything below this process. Nothing but an engine's processes may be running there."""
    deadline = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < deadline:
        below = descendants(os.getpid())[1:]
        for pid in below:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not below:
            return
        time.sleep(0.05)
