"""Weights in 4 or 8 bits: blocks of 32 inputs of one output that share a scale, and how they lie in panels.

int8   weight = scale * code                GGUF's Q8_0
int4   weight = scale * code + least        GGUF's Q4_1, and Q4_0 with least = -8 * scale

A panel holds 32 outputs, as those of `packing`; within it lie, for each 32 inputs in turn: the scales (float16 [32]),
with int4 the least values (float16 [32]), and the codes [32 outputs x 32 inputs] in the order in which the kernels
unpack them: 32 bits hold the codes of one output and every second input, so that one shift gives the next pair.

    int4   [2 of 16 outputs][2 of 16 inputs][2 of 8 outputs][8 outputs][even, odd input][8 codes of 4 bits]
    int8   [2 of 16 outputs][4 of  8 inputs][2 of 8 outputs][8 outputs][even, odd input][4 codes of 8 bits]

The kernels multiply the weights as bfloat16: what `values` gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kernels.cpu.packing import PANEL

BLOCK: Final = 32  # inputs

Float16 = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix [N, K]; K is a multiple of 32. int4 if `least` is there, else int8."""

    scales: Float16  # [N, K / 32]
    least: Float16 | None  # the same
    codes: npt.NDArray[np.int8] | npt.NDArray[np.uint8]  # [N, K]; int4: uint8 below 16

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def rows(self, order: npt.NDArray[np.intp]) -> Blocks:
        """The rows in another order."""
        least = None if self.least is None else self.least[order]
        return Blocks(self.scales[order], least, self.codes[order])

    def values(self) -> npt.NDArray[ml_dtypes.bfloat16]:
        """[N, K]. scale * code is exact in float32, so each weight is rounded once."""
        codes = self.codes.astype(np.float32).reshape(*self.scales.shape, BLOCK)
        weights = codes * self.scales.astype(np.float32)[..., None]
        if self.least is not None:
            weights += self.least.astype(np.float32)[..., None]
        return weights.reshape(self.shape).astype(ml_dtypes.bfloat16)


def joined(parts: list[Blocks | None]) -> Blocks | None:
    """One matrix below the other; None unless all are there and all have least values, or none has."""
    whole = [part for part in parts if part is not None]
    mins = [part.least for part in whole if part.least is not None]
    if len(whole) < len(parts) or len(mins) not in (0, len(parts)):
        return None
    scales, codes = np.concatenate([p.scales for p in whole]), np.concatenate([p.codes for p in whole])
    return Blocks(scales, np.concatenate(mins) if mins else None, codes)


def round_to_int8(weight: npt.NDArray[np.generic]) -> Blocks:
    """weight: [N, K]; K is padded with zeros. The largest of a block becomes 127 or -127."""
    blocks = _in_blocks(weight)
    scales = (np.abs(blocks).max(axis=-1) / 127).astype(np.float16)
    codes = np.clip(np.rint(_divide(blocks, scales)), -127, 127).astype(np.int8)
    return Blocks(scales, None, codes.reshape(len(weight), -1))


def round_to_int4(weight: npt.NDArray[np.generic]) -> Blocks:
    """weight: [N, K]; K is padded with zeros. 16 steps from the least to the largest of a block."""
    blocks = _in_blocks(weight)
    least = blocks.min(axis=-1).astype(np.float16)
    scales = ((blocks.max(axis=-1) - least.astype(np.float32)) / 15).astype(np.float16)
    codes = np.clip(np.rint(_divide(blocks - least.astype(np.float32)[..., None], scales)), 0, 15).astype(np.uint8)
    return Blocks(scales, least, codes.reshape(len(weight), -1))


def pack_blocks(blocks: Blocks) -> npt.NDArray[np.generic]:
    """Flat: uint8 for int4, int8 for int8."""
    return _panels(blocks).reshape(-1)


def pack_gate_up_blocks(gate: Blocks, up: Blocks) -> npt.NDArray[np.generic]:
    """The same, panels of gate and up in turn."""
    return np.stack((_panels(gate), _panels(up)), axis=1).reshape(-1)


def _in_blocks(weight: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """float32 [N, K / 32, 32]."""
    rows, columns = weight.shape
    padded = np.zeros((rows, -(-columns // BLOCK) * BLOCK), np.float32)
    padded[:, :columns] = weight.astype(np.float32)
    return padded.reshape(rows, -1, BLOCK)


def _divide(blocks: npt.NDArray[np.float32], scales: Float16) -> npt.NDArray[np.float32]:
    """0 where the scale is."""
    wide = scales.astype(np.float32)[..., None]
    return np.divide(blocks, wide, out=np.zeros_like(blocks), where=wide != 0)


def by_panel(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """values: [N, blocks, ...]. Returns [panels, blocks, 32 outputs, ...], padded with zeros."""
    outputs, per_row, *rest = values.shape
    count = -(-outputs // PANEL)
    padded = np.zeros((count * PANEL, per_row, *rest), values.dtype)
    padded[:outputs] = values
    return padded.reshape(count, PANEL, per_row, *rest).swapaxes(1, 2)


def panels_of(blocks: Blocks, words: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Scales, least values and words [panels, blocks, ...]: [panels, bytes of a panel]."""
    count, per_row = words.shape[:2]
    parts = [blocks.scales] if blocks.least is None else [blocks.scales, blocks.least]
    heads = [np.ascontiguousarray(by_panel(part)).view(np.uint8) for part in parts]
    codes = np.ascontiguousarray(words).view(np.uint8).reshape(count, per_row, -1)
    return np.concatenate([*heads, codes], axis=-1).reshape(count, -1)


def _panels(blocks: Blocks) -> npt.NDArray[np.generic]:
    """[N / 32, bytes of a panel]."""
    in_word = 4 if blocks.least is None else 8
    codes = by_panel(blocks.codes.reshape(*blocks.scales.shape, BLOCK)).view(np.uint8)
    words = codes.reshape(*codes.shape[:2], 2, 2, 8, BLOCK // (2 * in_word), in_word, 2)
    words = words.transpose(0, 1, 2, 5, 3, 4, 7, 6)  # the pairs of a word are innermost
    if blocks.least is None:
        return panels_of(blocks, words).view(np.int8)
    return panels_of(blocks, words[..., 0::2] | np.left_shift(words[..., 1::2], 4))
