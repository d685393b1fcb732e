"""The activation between the two matrix products of an MLP."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from kernels.cuda.device import Device, Grid, address
from kernels.cuda.elements import ELEMENTS, Dtype

_THREADS: Final = 256


class SiluMul:
    """silu(gate) * up over rows of `columns` elements of `dtype`. Any `columns` works; multiples of 8 are fast."""

    def __init__(self, device: Device, columns: int, dtype: Dtype) -> None:
        width = math.gcd(columns, 8)
        self._packets = columns // width
        defines: dict[str, int | str] = {"DTYPE": ELEMENTS[dtype].c_type, "COLUMNS": columns, "WIDTH": width}
        self._kernel = device.kernel("activation.cu", "silu_mul", defines, _THREADS)

    def launch(self, gate_up: int, out: int, rows: int) -> None:
        """gate_up: [rows, 2 * columns], the gate first. out: [rows, columns]. Addresses aligned to 16 bytes."""
        blocks = -(-rows * self._packets // _THREADS)
        self._kernel.launch(Grid(blocks), (address(gate_up), address(out), np.int32(rows)))
