"""The one seam through which shared words are written, so that a simulator can stop before any store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt


class Memory:
    """Stores straight into the shared arrays."""

    def __init__(self, hit: Callable[[str], None] = lambda name: None) -> None:
        self._hit = hit

    def put(self, array: npt.NDArray[Any], index: Any, value: Any) -> None:
        """One store, or a batch of stores in any order whose every partial result is harmless.

        A word that changes under a reader is an aligned u64: it is never seen half-written.
        Whatever is wider becomes visible by a later single store.
        """
        self._hit("kvmanager.store.before")
        array[index] = value
