"""When a missed deadline is a hang. Pure: times come from outside.

A supervisor that did not run for a while, because the machine slept or everything was stopped, sees
old deadlines first, of children that had no chance to meet them. So only the time in which it kept
looking counts, and a turn that ended after all is no hang.
"""

from __future__ import annotations

from typing import Final

_SEEN_SECONDS: Final = 1.0  # of looking at the same missed deadline
_SEEN_LOW_SECONDS: Final = 20.0  # of a process that has to give way to others
_MOST_SECONDS: Final = 0.25  # between two looks; what lies beyond was not looked at


class HangWatch:
    """One process's turns, as its parent sees them."""

    def __init__(self) -> None:
        self._missed = 0
        self._looked_at = 0.0
        self._seen = 0.0  # seconds

    def look(self, now: float, missed: int, is_low: bool = False) -> bool:
        """Whether the process hangs.

        now: monotonic seconds. missed: the deadline that is over, 0 if none is. is_low: its priority is lowered.
        """
        passed, self._looked_at = now - self._looked_at, now
        if missed == 0 or missed != self._missed:
            self._missed, self._seen = missed, 0.0
            return False
        self._seen += min(passed, _MOST_SECONDS)
        return self._seen >= (_SEEN_LOW_SECONDS if is_low else _SEEN_SECONDS)
