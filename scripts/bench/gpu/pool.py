"""A page pool to measure on, filled with random numbers, in either layout; and block tables spread over all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from gpu.bed import Bed

PAGE_SIZE: Final = 16
KV_HEADS: Final = 8
HEAD_DIM: Final = 128
LAYOUTS: Final = ("page-major", "layer-major")

_FILL_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the K/V of one layer."""

    dtype: torch.dtype = torch.bfloat16  # of pages: bfloat16, float16 or float8_e4m3fn
    kv_heads: int = KV_HEADS
    page_size: int = PAGE_SIZE
    head_dim: int = HEAD_DIM

    @property
    def half_bytes(self) -> int:
        """K, or V, of one page in one layer."""
        return self.kv_heads * self.page_size * self.head_dim * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def needed_bytes(self, contexts: np.ndarray) -> int:
        """K and V that one launch over sequences of these lengths must read: no slot more than there are tokens."""
        return int(contexts.sum()) * self.token_bytes


class Pool:
    """Pages of several layers; each launch of a benchmark takes another layer, as a model's layers do."""

    def __init__(self, bed: Bed, shape: Shape, pages: int, layers: int, layout: str) -> None:
        assert layout in LAYOUTS
        self.shape, self.pages, self.layers = shape, pages, layers
        self.half_stride = shape.half_bytes
        both = 2 * shape.half_bytes
        page_major = layout == "page-major"
        self.layer_stride = both if page_major else both * pages
        self.page_stride = both * layers if page_major else both
        self.memory = torch.empty(both * layers * pages, dtype=torch.uint8, device=bed.torch_device)
        _fill(self.memory, shape.dtype)

    def address(self, layer: int) -> int:
        """Where the layer begins: page 0, K."""
        return self.memory.data_ptr() + layer * self.layer_stride

    def keys_values(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [pages, page_size, kv_heads, head_dim] of the layer, as our kernels lay heads out."""
        shape = self.shape
        return self._views(layer, (shape.head_dim, shape.page_size * shape.head_dim))

    def peer_keys_values(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same memory, same shape, with a token's heads side by side: what other engines are made for."""
        shape = self.shape
        return self._views(layer, (shape.kv_heads * shape.head_dim, shape.head_dim))

    def _views(self, layer: int, strides: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.shape
        typed, size = self.memory.view(shape.dtype), shape.dtype.itemsize
        sizes = (self.pages, shape.page_size, shape.kv_heads, shape.head_dim)

        def half(index: int) -> torch.Tensor:
            offset = (layer * self.layer_stride + index * self.half_stride) // size
            return typed.as_strided(sizes, (self.page_stride // size, *strides, 1), offset)

        return half(0), half(1)

    def tables(self, contexts: np.ndarray, seed: int = 0) -> np.ndarray:
        """int32 [sequences, most pages]: a random choice of all pages, none twice."""
        needed = -(-contexts // self.shape.page_size)
        chosen = np.random.default_rng(seed).permutation(self.pages)[: needed.sum()].astype(np.int32)
        assert len(chosen) == needed.sum(), "the pool has fewer pages than the sequences need"
        found = np.zeros((len(contexts), int(needed.max())), np.int32)
        found[np.arange(found.shape[1]) < needed[:, None]] = chosen
        return found


def pages_and_layers(bed: Bed, shape: Shape, needed_pages: int, budget: int, most_layers: int = 32) -> tuple[int, int]:
    """How a pool of at most `budget` bytes is shaped: as many layers as a model's, while the pages still fit.

    Raises ValueError where not even one layer fits.
    """
    page = 2 * shape.half_bytes
    layers = min(most_layers, budget // (page * needed_pages))
    if layers < 1:
        raise ValueError(f"{needed_pages} pages of {page} bytes do not fit {budget / 1e9:.0f} GB")
    return budget // (page * layers), layers


def _fill(memory: torch.Tensor, dtype: torch.dtype) -> None:
    """Standard normal numbers: zeros would be faster than what is ever served."""
    typed = memory.view(dtype)
    step = _FILL_BYTES // dtype.itemsize
    for start in range(0, typed.numel(), step):
        part = typed[start : start + step]
        part.copy_(torch.randn(part.numel(), device=memory.device, dtype=torch.bfloat16).to(dtype))


def expected(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: np.ndarray, context: int
) -> torch.Tensor:
    """Attention of one sequence in float64, to check what is timed.

    queries: [count, heads, head_dim], the last of `context` positions. keys, values: views [pages, page_size,
    kv_heads, head_dim]. table: page ids. Returns [count, heads, head_dim].
    """
    count, heads, head_dim = queries.shape
    pages = torch.from_numpy(table[: -(-context // keys.shape[1])].astype(np.int64)).to(keys.device)
    group = heads // keys.shape[2]
    k, v = (
        half.view(torch.uint8)[pages].view(half.dtype).flatten(0, 1)[:context].double().repeat_interleave(group, dim=1)
        for half in (keys, values)
    )
    scores = torch.einsum("qhd,khd->hqk", queries.double(), k) / head_dim**0.5
    at = torch.arange(context - count, context, device=keys.device)
    hidden = torch.arange(context, device=keys.device)[None, :] > at[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
