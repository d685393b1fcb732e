"""Matrix products whose rows do not depend on the batch: the deterministic mode's linear layers."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from kernels.cuda.device import Device, Grid, Kernel, address
from kernels.cuda.elements import ELEMENTS, Dtype

_TILE_K: Final = 64


class _Tile(NamedTuple):
    """As in `gemm.cu`."""

    name: str
    rows: int
    columns: int
    threads: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.rows + self.columns) * _TILE_K * 2

    def grid(self, m: int, n: int) -> Grid:
        return Grid(-(-m // self.rows), -(-n // self.columns))


_NARROW: Final = _Tile("gemm_narrow", 64, 64, 128, 6)
_WIDE: Final = _Tile("gemm_wide", 128, 128, 256, 3)


class FixedGemm:
    """y = a W^T + bias, summed over ascending k in float32: a row's result has the same bits for any m.

    The tile is chosen by the sizes: the wide one where it has a block for each multiprocessor. Both give the same bits.
    """

    def __init__(self, device: Device, dtype: Dtype) -> None:
        defines: dict[str, int | str] = {"DTYPE": ELEMENTS[dtype].c_type}

        def kernel(tile: _Tile, suffix: str) -> Kernel:
            return device.kernel("gemm.cu", tile.name + suffix, defines, tile.threads, tile.shared_bytes)

        self._multiprocessors = device.multiprocessors
        self._kernels = {
            (tile, wide_output): kernel(tile, "_float32" if wide_output else "")
            for tile in (_NARROW, _WIDE)
            for wide_output in (False, True)
        }

    def launch(
        self,
        *,
        a: int,
        weight: int,
        out: int,
        m: int,
        n: int,
        k: int,
        bias: int = 0,
        float32_out: bool = False,
    ) -> None:
        """a: [m, k], weight: [n, k] as of `torch.nn.Linear`, out: [m, n], bias: [n] or 0, by address, contiguous.

        All of `dtype`, but out is float32 with float32_out; a and weight are aligned to 16 bytes.
        Raises ValueError when k is no positive multiple of 8, which is what a 16-byte access takes.
        """
        if k <= 0 or k % 8:
            raise ValueError(f"k = {k} is no positive multiple of 8")
        wide = _WIDE.grid(m, n)
        tile = _WIDE if m > _NARROW.rows and wide.x * wide.y >= self._multiprocessors else _NARROW
        addresses = (address(a), address(weight), address(bias), address(out))
        self._kernels[tile, float32_out].launch(tile.grid(m, n), (*addresses, np.int32(m), np.int32(n), np.int32(k)))
