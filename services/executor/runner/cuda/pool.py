"""The page pool as the kernels see it: one address and three strides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.cuda.elements import ELEMENTS, KvDtype
from kernels.cuda.pages import PageLayout
from kvmanager.layout import F32, Strides
from services.executor.modelstore.spec import DecoderSpec


class PoolMemory(Protocol):
    """Memory of the device that stays where it is as long as this object lives."""

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory that `owner` keeps alive."""

    address: int
    nbytes: int
    owner: object = None


@dataclass(frozen=True, slots=True)
class Pool:
    """scales: float32 [layers, 2, kv_heads, padded] on the device; None: ones."""

    memory: PoolMemory
    strides: Strides
    scales: torch.Tensor | None = None

    def layer(self, index: int) -> int:
        """The address of the layer's part of page 0."""
        return self.memory.address + index * self.strides.layer

    def k_scale(self, layer: int) -> int:
        """The address of float32 [kv_heads]; 0: ones."""
        return self.scales[layer, 0].data_ptr() if self.scales is not None else 0

    def v_scale(self, layer: int) -> int:
        return self.scales[layer, 1].data_ptr() if self.scales is not None else 0


def make_pool(
    memory: PoolMemory, spec: DecoderSpec, strides: Strides, scales: F32 | None, device: torch.device
) -> Pool:
    """scales: float32 [layers * 2 * kv_heads] for fp8 pages, whose attention reads them; others have none."""
    if scales is None or not len(scales):
        return Pool(memory, strides)
    # Each layer's begin at a multiple of 16 bytes.
    given = torch.zeros(spec.layers, 2, -(-spec.kv_heads // 4) * 4)
    given[:, :, : spec.kv_heads] = torch.from_numpy(scales.reshape(spec.layers, 2, spec.kv_heads).copy())
    return Pool(memory, strides, given.to(device))


def page_major(spec: DecoderSpec, kv_dtype: KvDtype, page_size: int) -> Strides:
    """All layers of a page lie together."""
    half = spec.kv_heads * page_size * spec.head_dim * ELEMENTS[kv_dtype].itemsize
    return Strides(page=spec.layers * 2 * half, layer=2 * half, half=half)


def page_layout(spec: DecoderSpec, kv_dtype: KvDtype, page_size: int, strides: Strides) -> PageLayout:
    itemsize = ELEMENTS[kv_dtype].itemsize
    return PageLayout(spec.layers, spec.kv_heads, page_size, spec.head_dim, itemsize, *strides)
