"""What a process must know of another: whether it still lives, and to die with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Final

from pagehold.runtime.progress import ProgressView, State, pid_namespace

_PR_SET_PDEATHSIG: Final = 1
_START_SLACK_SECONDS: Final = 2.0  # a process begins before it writes its progress file


def die_with_parent(parent: int) -> None:
    """From now on this process is killed when `parent`, its supervisor, dies; at once when it is dead already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def is_elsewhere(view: ProgressView) -> bool:
    """Whether its pid means nothing here: it runs in another container."""
    return view.pid_namespace not in (0, pid_namespace())


def is_alive(view: ProgressView) -> bool:
    """Whether the process that wrote this progress still runs. Its pid may have been given to another since.

    In another container's it is as long as it keeps its deadlines, so for a while after its death as well.
    """
    if is_elsewhere(view):
        kept = max(view.deadline_ns, view.alive_until_ns) > time.monotonic_ns()
        return view.state is not State.DOWN and kept
    try:
        fields = Path(f"/proc/{view.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    state, start_ticks = fields[0], int(fields[19])
    started = start_ticks / os.sysconf("SC_CLK_TCK")
    return state not in "ZX" and started <= view.started_ns / 1e9 + _START_SLACK_SECONDS
