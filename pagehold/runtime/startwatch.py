"""Beats for a process that starts: whoever is stopped before its first turn is found as well.

Loading and adopting have no turns, and may take long: a thread beats for them as long as the process runs at all.
"""

from __future__ import annotations

import threading
from typing import Final

from pagehold.runtime.progress import Progress

_BEATS: Final = 4  # in the time after which a process counts as hung


class StartWatch:
    """The only writer of the deadline until `end`."""

    def __init__(self, progress: Progress, hang_seconds: float) -> None:
        self._progress = progress
        self._seconds = hang_seconds
        self._over = threading.Event()
        progress.begin_turn(hang_seconds)
        self._thread = threading.Thread(target=self._beat, name="start", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._over.wait(self._seconds / _BEATS):
            self._progress.begin_turn(self._seconds)

    def end(self) -> None:
        """Turns follow, or a wait of any length: the deadline is the caller's from here on, and 0."""
        self._over.set()
        self._thread.join()
        self._progress.end_turn()
