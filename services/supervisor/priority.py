"""A process that loads beside one that serves gives way to it, where the system lets us take that back later."""

from __future__ import annotations

import os
import threading
from typing import Final

_NICE: Final = 5  # about a quarter of a processor that another one wants as well: loading must come to its end


def lower(pid: int) -> bool:
    """Whether it was done. Without the right to undo it, it is not."""
    if not _may_raise():
        return False
    try:
        os.setpriority(os.PRIO_PROCESS, pid, _own() + _NICE)
    except OSError:
        return False  # it has ended
    return True


def restore(pid: int) -> None:
    """To this process's own. A thread has the priority of the one that started it, hence one after the other."""
    done: set[str] = set()
    try:
        while left := set(os.listdir(f"/proc/{pid}/task")) - done:
            for thread in left:
                os.setpriority(os.PRIO_PROCESS, int(thread), _own())
            done |= left
    except OSError:
        pass  # it has ended, or one of its threads just then; the next look does the rest


def _own() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def _may_raise() -> bool:
    """Tried on a thread that ends at once."""
    allowed = False

    def attempt() -> None:
        nonlocal allowed
        nice = _own()
        try:
            os.setpriority(os.PRIO_PROCESS, 0, nice + 1)
            os.setpriority(os.PRIO_PROCESS, 0, nice)
            allowed = True
        except OSError:
            pass

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return allowed
