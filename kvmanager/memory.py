"""The one seam through which shared words are written, so that a simulator can stop before any store."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class Memory:
    """Stores straight into the shared arrays."""

    def put(self, array: npt.NDArray[Any], index: Any, value: Any) -> None:
        """One store. A word that changes under a reader is written alone; wider values are made
        visible by a later single store."""
        array[index] = np.uint64(value) if isinstance(value, int) and array.dtype == np.uint64 else value
