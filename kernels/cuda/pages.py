"""Copies of pages within the pool, and between the pool and a packed buffer: copy-on-write and swap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kernels.cuda.device import Device, Grid, address

_THREADS: Final = 256
_VECTOR: Final = 16  # bytes of one access


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Where the parts of a page lie; strides in bytes.

    The K or V block of one head in one layer is contiguous: [page_size, head_dim] elements; the blocks of a layer's
    KV heads follow each other.
    """

    layers: int
    kv_heads: int
    page_size: int
    head_dim: int
    itemsize: int
    page_stride: int
    layer_stride: int
    half_stride: int

    @classmethod
    def page_major(cls, layers: int, kv_heads: int, page_size: int, head_dim: int, itemsize: int) -> PageLayout:
        """All layers of a page lie together."""
        half = kv_heads * page_size * head_dim * itemsize
        return cls(layers, kv_heads, page_size, head_dim, itemsize, layers * 2 * half, 2 * half, half)

    @classmethod
    def layer_major(
        cls, layers: int, kv_heads: int, page_size: int, head_dim: int, itemsize: int, pages: int
    ) -> PageLayout:
        """All pages of a layer lie together."""
        half = kv_heads * page_size * head_dim * itemsize
        return cls(layers, kv_heads, page_size, head_dim, itemsize, 2 * half, pages * 2 * half, half)

    @property
    def run_bytes(self) -> int:
        """Bytes of a page's K or V in one layer."""
        return self.kv_heads * self.page_size * self.head_dim * self.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all layers: its size in a packed buffer."""
        return self.layers * 2 * self.run_bytes


class PageCopy:
    """Moves pages of a pool with this layout. Everything by address, aligned to 16 bytes.

    Raises ValueError when a slot of one head is no multiple of 16 bytes.
    """

    def __init__(self, device: Device, layout: PageLayout) -> None:
        slot_bytes = layout.head_dim * layout.itemsize
        if slot_bytes % _VECTOR:
            raise ValueError(f"a slot of {slot_bytes} bytes is no multiple of {_VECTOR}")
        self._layout = layout
        self._parts = 2 * layout.layers
        self._slot_vectors = slot_bytes // _VECTOR
        self._strides = (np.int64(layout.page_stride), np.int64(layout.layer_stride), np.int64(layout.half_stride))
        self._copy = device.kernel("pages.cu", "copy_slots", {}, _THREADS)
        self._gather = device.kernel("pages.cu", "gather_pages", {}, _THREADS)
        self._scatter = device.kernel("pages.cu", "scatter_pages", {}, _THREADS)

    def copy_slots(self, pool: int, pairs: int, count: int) -> None:
        """pairs: int32 [count, 4] of {source page, target page, slots, 0}: K and V of the first slots, all layers.

        A page may be the source of many pairs; none may be a target twice, or both source and target.
        """
        layout = self._layout
        sizes = (np.int32(layout.kv_heads), np.int32(layout.page_size), np.int32(self._slot_vectors))
        self._copy.launch(Grid(count, self._parts), (address(pool), address(pairs), *self._strides, *sizes))

    def gather(self, pool: int, pages: int, packed: int, count: int, blocks: int | None = None) -> None:
        """packed = the pages, [count, layers, 2, kv_heads, page_size, head_dim]. pages: int32 [count].

        packed: device memory, or pinned host memory by its address on the device. blocks: at most so many, so that
        a transfer over the bus leaves multiprocessors to the step; default: as many as there are runs.
        """
        self._gather.launch(self._grid(count, blocks), self._arguments(pool, pages, packed, count))

    def scatter(self, pool: int, pages: int, packed: int, count: int, blocks: int | None = None) -> None:
        """The pages = packed; as `gather`. No page may be in the list twice."""
        self._scatter.launch(self._grid(count, blocks), self._arguments(pool, pages, packed, count))

    def _grid(self, count: int, blocks: int | None) -> Grid:
        runs = count * self._parts
        return Grid(runs if blocks is None else min(runs, blocks))

    def _arguments(self, pool: int, pages: int, packed: int, count: int) -> tuple[np.generic, ...]:
        sizes = (np.int32(count), np.int32(self._parts), np.int32(self._layout.run_bytes // _VECTOR))
        return (address(pool), address(pages), address(packed), *self._strides, *sizes)
