"""RMSNorm of rows, alone and fused with the residual's addition."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from kernels.cuda.device import Device, Grid, address
from kernels.cuda.elements import ELEMENTS, Dtype

_MAX_THREADS: Final = 512
_MAX_HIDDEN: Final = 16384  # a row lies in the registers of its block


class Norms:
    """The norms of a model: rows of `hidden` elements of `dtype`, weights float32 [hidden].

    All tensors are contiguous and given by address, aligned to 16 bytes. A row's result does not depend on the
    other rows. Rounding is that of Hugging Face's RMSNorm (see `norm.cu`). Any `hidden` works; multiples of 8 are fast.
    Raises ValueError for a `hidden` below 1 or above 16384.
    """

    def __init__(self, device: Device, hidden: int, dtype: Dtype, eps: float) -> None:
        if not 0 < hidden <= _MAX_HIDDEN:
            raise ValueError(f"a row of {hidden} elements; 1 to {_MAX_HIDDEN} are possible")
        width = math.gcd(hidden, 8)
        threads = min(_MAX_THREADS, -(-hidden // width // 32) * 32)
        defines: dict[str, int | str] = {
            "DTYPE": ELEMENTS[dtype].c_type,
            "HIDDEN": hidden,
            "WIDTH": width,
            "THREADS": threads,
        }
        self._plain = device.kernel("norm.cu", "rms_norm", defines, threads)
        self._added = device.kernel("norm.cu", "add_rms_norm", defines, threads)
        self._epsilon = np.float32(eps)

    def rms_norm(self, x: int, weight: int, out: int, rows: int) -> None:
        """out = weight * normalised x. x, out: [rows, hidden]; they may be the same."""
        self._plain.launch(Grid(rows), (address(x), address(weight), address(out), self._epsilon))

    def add_rms_norm(self, x: int, residual: int, weight: int, out: int, rows: int) -> None:
        """residual += x, then out = weight * normalised residual. All [rows, hidden]; x and out may be the same."""
        arguments = (address(x), address(residual), address(weight), address(out), self._epsilon)
        self._added.launch(Grid(rows), arguments)
