"""The layout of linear weights: bfloat16 panels [N/32][K/2][32][2].

A panel holds 32 outputs; innermost lie two inputs of one output, as `vdpbf16ps` wants them, and
as a shift and a mask widen them. N is padded to 32 and K to 2 with zeros.

`gate_up` alternates panels, gate first, so that one piece of work has both halves of SiLU(gate) * up.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

PANEL: Final = 32

Packed = npt.NDArray[np.uint16]


def pack_linear(weight: npt.NDArray[np.generic]) -> Packed:
    """weight: bfloat16 [N, K], as ml_dtypes.bfloat16 or its uint16 bits. Returns flat uint16."""
    return _panels(weight).reshape(-1)


def unpack_linear(packed: npt.NDArray[np.generic], outputs: int, inputs: int) -> npt.NDArray[np.generic]:
    """The inverse: bfloat16 [outputs, inputs]."""
    return _rows(_shaped(packed, outputs, inputs), outputs, inputs)


def pack_gate_up(gate: npt.NDArray[np.generic], up: npt.NDArray[np.generic]) -> Packed:
    """gate, up: bfloat16 [N, K]. Returns flat uint16: [N/32][gate, up][K/2][32][2]."""
    return np.stack((_panels(gate), _panels(up)), axis=1).reshape(-1)


def unpack_gate_up(
    packed: npt.NDArray[np.generic], outputs: int, inputs: int
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """The inverse: gate and up, bfloat16 [outputs, inputs] each."""
    both = packed.view(np.uint16).reshape(-1, 2, (inputs + 1) // 2, PANEL, 2)
    return _rows(both[:, 0], outputs, inputs), _rows(both[:, 1], outputs, inputs)


def _panels(weight: npt.NDArray[np.generic]) -> Packed:
    """[N/32][K/2][32][2]."""
    bits = weight.view(np.uint16)
    outputs, inputs = bits.shape
    padded = np.zeros((-(-outputs // PANEL) * PANEL, -(-inputs // 2) * 2), np.uint16)
    padded[:outputs, :inputs] = bits
    return np.ascontiguousarray(padded.reshape(-1, PANEL, padded.shape[1] // 2, 2).transpose(0, 2, 1, 3))


def _shaped(packed: npt.NDArray[np.generic], outputs: int, inputs: int) -> Packed:
    return packed.view(np.uint16).reshape(-(-outputs // PANEL), (inputs + 1) // 2, PANEL, 2)


def _rows(panels: Packed, outputs: int, inputs: int) -> npt.NDArray[np.generic]:
    import ml_dtypes  # only the conversion and the tests need the type

    rows = panels.transpose(0, 2, 1, 3).reshape(panels.shape[0] * PANEL, -1)
    return np.ascontiguousarray(rows[:outputs, :inputs]).view(ml_dtypes.bfloat16)
