"""Deaths at a chosen store: the manager's shared stores and the executor's own."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmanager.memory import Memory


class Violation(Exception):
    """An invariant does not hold."""


class Killed(BaseException):
    """A process died: no `except Exception` of its own may see it."""


class ManagerKilled(Killed):
    """Before a store, or half-way through a batch of them."""


class ExecutorKilled(Killed):
    """Before one of its stores."""


class Countdown:
    """Counts stores and dies before those whose numbers are planned."""

    def __init__(self, planned: frozenset[int]) -> None:
        self._planned = planned
        self.count = 0

    def due(self) -> bool:
        self.count += 1
        return self.count - 1 in self._planned


class DyingMemory(Memory):
    """The manager's seam: a planned death leaves any part of a batch behind, in whole words."""

    def __init__(self, countdown: Countdown, rng: random.Random) -> None:
        self._countdown = countdown
        self._rng = rng

    def put(self, array: npt.NDArray[Any], index: Any, value: Any) -> None:
        if self._countdown.due():
            self._tear(array, index, np.asarray(value, array.dtype))
            raise ManagerKilled
        array[index] = value

    def _tear(self, array: npt.NDArray[Any], index: Any, value: npt.NDArray[Any]) -> None:
        if value.ndim == 0:
            return
        done = np.array([self._rng.random() < 0.5 for _ in range(len(value))], bool)
        torn = array[index].copy()
        torn[done] = value[done]
        array[index] = torn
