"""How long a step may take: learned from those before it, so that a hang is found soon and a long prefill is none.

Steps are told apart by their size in powers of two: what a decode costs says nothing about a prompt.
"""

from __future__ import annotations

from typing import Final

_UNKNOWN_SECONDS: Final = 0.1  # for a position, before steps of its size were seen
_LEAST_SECONDS: Final = 0.01  # for a position, whatever was seen: contexts grow
_GENEROUS: Final = 20.0  # a loaded machine is no fault
_FADE: Final = 0.98  # a step: the slowest one is remembered for about 50
_ENOUGH: Final = 8  # steps of a size


class Pace:
    """The slowest of the recent steps of each size."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._slowest: dict[int, float] = {}  # seconds

    def learn(self, positions: int, seconds: float) -> None:
        size = positions.bit_length()
        self._seen[size] = self._seen.get(size, 0) + 1
        self._slowest[size] = max(seconds, self._slowest.get(size, 0.0) * _FADE)

    def seconds(self, positions: int) -> float:
        """What a step of so many positions may take at most."""
        size = positions.bit_length()
        if self._seen.get(size, 0) < _ENOUGH:
            return _UNKNOWN_SECONDS * positions
        return max(_GENEROUS * self._slowest[size], _LEAST_SECONDS * positions)
