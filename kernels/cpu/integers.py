"""Weights in 8 bits with one scale for each output, which are multiplied as integers.

weight = scale * code; inputs are rounded to codes too when they are multiplied, each row by its largest value.

A panel holds 32 outputs, as those of `packing`: their scales (float32 [32]), the totals of their codes (int32 [32]),
and the codes [K/4][32][4], four inputs of an output innermost, as `vpdpbusd` and tiles of bytes want them. N is padded
to 32 and K to 4 with zeros.

The inputs of `down` are rotated before they are rounded: `rotate` is what the kernels do with a row, and
`counter_rotate` what the weights must have had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kernels.cpu.packing import PANEL

F32 = npt.NDArray[np.float32]

_TOGETHER: Final = 4  # codes in 32 bits
_BESIDE: Final = 16  # values that are rotated alike
_MOST: Final = 32  # values that are rotated together


@dataclass(frozen=True, slots=True)
class Integers:
    """A matrix [N, K]."""

    scales: F32  # [N]
    codes: npt.NDArray[np.int8]  # [N, K]

    def values(self) -> F32:
        """[N, K]."""
        return self.codes.astype(np.float32) * self.scales[:, None]


def round_to_integers(weight: npt.NDArray[np.generic]) -> Integers:
    """weight: [N, K]. The largest of an output becomes 127 or -127."""
    wide = weight.astype(np.float32)
    scales = (np.abs(wide).max(axis=1) / 127).astype(np.float32)
    divisors = np.where(scales == 0, np.float32(1), scales)
    return Integers(scales, np.clip(np.rint(wide / divisors[:, None]), -127, 127).astype(np.int8))


def pack_integers(matrix: Integers) -> npt.NDArray[np.uint32]:
    """Flat, in words of four codes."""
    return _panels(matrix).reshape(-1)


def pack_gate_up_integers(gate: Integers, up: Integers) -> npt.NDArray[np.uint32]:
    """The same, panels of gate and up in turn."""
    return np.stack((_panels(gate), _panels(up)), axis=1).reshape(-1)


def _panels(matrix: Integers) -> npt.NDArray[np.uint32]:
    """[N/32, words of a panel]."""
    outputs, inputs = matrix.codes.shape
    count, words = -(-outputs // PANEL), -(-inputs // _TOGETHER)
    codes = np.zeros((count * PANEL, words * _TOGETHER), np.int8)
    codes[:outputs, :inputs] = matrix.codes
    scales = np.zeros(count * PANEL, np.float32)
    scales[:outputs] = matrix.scales
    totals = codes.sum(axis=1, dtype=np.int32)
    by_input = codes.view(np.uint32).reshape(count, PANEL, words).swapaxes(1, 2)
    heads = [part.view(np.uint32).reshape(count, PANEL) for part in (scales, totals)]
    return np.concatenate([*heads, by_input.reshape(count, -1)], axis=1)


def hadamard(values: F32) -> F32:
    """values [..., n, k], n a power of two, by Sylvester's Hadamard matrix along n. Done twice: n times the values."""
    n = values.shape[-2]
    for half in (1 << i for i in range(n.bit_length() - 1)):
        low, high = np.moveaxis(values.reshape(*values.shape[:-2], -1, 2, half, values.shape[-1]), -3, 0)
        values = np.stack((low + high, low - high), axis=-3).reshape(values.shape)
    return values


def rotation(inputs: int) -> int:
    """How many values of a row of `down`'s inputs are rotated together; 1: none."""
    width = 1
    while width < _MOST and inputs % (2 * width * _BESIDE) == 0:
        width *= 2
    return width


def rotate(rows: F32) -> F32:
    """rows: [..., inputs]; each value with those 16, 32, … further on."""
    width = rotation(rows.shape[-1])
    return rows if width == 1 else hadamard(rows.reshape(*rows.shape[:-1], -1, width, _BESIDE)).reshape(rows.shape)


def counter_rotate(weight: F32) -> F32:
    """[N, inputs] so that products with rotated rows are those of `weight` with the rows."""
    return rotate(weight) / np.float32(rotation(weight.shape[-1]))
