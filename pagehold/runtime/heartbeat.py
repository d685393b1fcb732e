"""A process shows that it runs at all, however long its turns may take.

A turn's deadline must allow for the longest turn there is, a prompt of unknown cost or a pool that is allocated. A
process that was stopped, or that starts and never comes on, is found much sooner: its heartbeat is missing.
"""

from __future__ import annotations

import threading
from typing import Final

from pagehold.runtime.progress import Progress

_BEATS: Final = 4  # in the time after which a process counts as hung


class Heartbeat:
    """A thread that beats until `end`, or as long as the process lives."""

    def __init__(self, progress: Progress, hang_seconds: float) -> None:
        self._progress = progress
        self._seconds = hang_seconds
        self._over = threading.Event()
        progress.beat(hang_seconds)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self._seconds / _BEATS):
            self._progress.beat(self._seconds)

    def end(self) -> None:
        """The progress file is another process's from here on."""
        self._over.set()
        self._thread.join()
        self._progress.end_beats()
