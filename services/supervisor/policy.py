"""When a dead child is started again. Pure: times come from outside.

At once, as long as the system gets on: only when a child dies for the third time within ten
seconds and no token was committed meanwhile does it wait, a little longer each time.
"""

from __future__ import annotations

from collections import deque
from typing import Final

_WINDOW_SECONDS: Final = 10.0
_FREE_DEATHS: Final = 2
_FIRST_DELAY: Final = 0.2
_LONGEST_DELAY: Final = 5.0


class RestartPolicy:
    """One child's deaths."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque(maxlen=16)
        self._marker: object = None

    def delay(self, now: float, marker: object) -> float:
        """Seconds to wait after a death at `now`, monotonic. marker: differs from the last one's if tokens came."""
        if marker != self._marker:
            self._deaths.clear()
            self._marker = marker
        # Waiting itself must not make deaths look rare.
        while self._deaths and now - self._deaths[0] > _WINDOW_SECONDS + _LONGEST_DELAY * len(self._deaths):
            self._deaths.popleft()
        self._deaths.append(now)
        beyond = len(self._deaths) - _FREE_DEATHS
        return min(_FIRST_DELAY * 2 ** (beyond - 1), _LONGEST_DELAY) if beyond > 0 else 0.0
