"""Weights in 4 or 8 bits that are multiplied as integers, with a scale for each 32 inputs of an output.

The same blocks as in `blocks`, in another order. Inputs are rounded to codes of 8 bits when they are multiplied, 32 of
a row by the largest of them: so a channel that is far larger than the others leaves few codes to its neighbours alone.

A panel holds 32 outputs, as those of `packing`; within it lie, for each 32 inputs in turn: the scales (float16 [32]),
with int4 the least values (float16 [32]), and the codes without signs, four inputs of an output innermost, as
`vpdpbusd` wants them:

    int4   [4 of 8 inputs][32 outputs][4 inputs]: in the low halves of bytes; of the 4 inputs behind them in the high
    int8   [8 of 4 inputs][32 outputs][4 inputs]: codes + 128
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kernels.cpu.blocks import BLOCK, Blocks, by_panel, panels_of
from kernels.cpu.packing import PANEL

_TOGETHER = 4  # codes in 32 bits


def pack_integer_blocks(blocks: Blocks) -> npt.NDArray[np.generic]:
    """Flat: int64 for int4, int32 for int8."""
    return _panels(blocks).reshape(-1)


def pack_gate_up_integer_blocks(gate: Blocks, up: Blocks) -> npt.NDArray[np.generic]:
    """The same, panels of gate and up in turn."""
    return np.stack((_panels(gate), _panels(up)), axis=1).reshape(-1)


def _panels(blocks: Blocks) -> npt.NDArray[np.generic]:
    """[N / 32, words of a panel]."""
    eight = blocks.least is None
    codes = (blocks.codes.astype(np.int16) + 128 if eight else blocks.codes).astype(np.uint8)
    words = by_panel(codes.reshape(len(codes), -1, BLOCK))
    halves = 1 if eight else 2
    words = words.reshape(*words.shape[:2], PANEL, -1, halves, _TOGETHER)
    packed = words[..., 0, :] if eight else words[..., 0, :] | np.left_shift(words[..., 1, :], 4)
    return panels_of(blocks, packed.swapaxes(2, 3)).view(np.int32 if eight else np.int64)
