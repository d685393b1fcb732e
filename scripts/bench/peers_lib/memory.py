"""Peak memory of a tree of processes, by proportional set size: a page that several map is counted once."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

# Reading a rollup walks page tables: often enough for a peak that lasts, rarely enough not to be seen.
INTERVAL: Final = 1.0


def descendants(root: int) -> list[int]:
    """`root` and all processes below it, as of now."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with suppress(OSError, ValueError, IndexError):
            # The command's name, in parentheses, may hold spaces.
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(entry))
    found = [root]
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def proportional_size(pid: int) -> int:
    """Bytes; 0 of a process that is gone."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


class PeakMemory:
    """Samples the tree below `root` while the context is entered; `peak` is in bytes."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self.peak = 0

    def __enter__(self) -> Self:
        # A short part may end before the first interval, and what it used be gone when its end is heard of.
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stopped.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        self.peak = max(self.peak, sum(proportional_size(pid) for pid in descendants(self._root)))
