"""How busy the machine was with something else while an engine was measured."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from peers_lib.memory import descendants

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_USER, _CHILDREN_SYSTEM = 11, 14  # utime, stime, cutime and cstime, counted after the command's name


class OtherWork:
    """From its making to `processors()`. Time that a hypervisor takes is not seen."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._foreign = _machine_seconds() - _own_seconds()

    def processors(self) -> float:
        """The number of processors, on average, that others kept busy."""
        spent = _machine_seconds() - _own_seconds() - self._foreign
        return max(spent / (time.monotonic() - self._began), 0.0)


def _machine_seconds() -> float:
    """User, nice, system and the interrupts: what /proc/stat counts as work."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _wait, interrupt, soft = map(int, fields[:7])
    return (user + nice + system + interrupt + soft) / _TICKS


def _own_seconds() -> float:
    """Of this process and all below it, with the children that are gone already."""
    total = 0
    for pid in descendants(os.getpid()):
        with suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[_USER : _CHILDREN_SYSTEM + 1]))
    return total / _TICKS
