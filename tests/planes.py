"""Pages of the CPU's kernels, to and from slots: [pages, layers, k and v, kv_heads, page_size, head_dim].

Slots of int8 pages are uint8 [..., head_dim + 4], the codes and then their scale.
"""

from __future__ import annotations

import numpy as np


def _together(dtype: np.dtype) -> int:
    return 4 // dtype.itemsize


def to_planes(slots: np.ndarray) -> np.ndarray:
    """uint8 [pages, layers, k and v, kv_heads, bytes of a plane]."""
    together, page_size = _together(slots.dtype), slots.shape[-2]
    head_dim = slots.shape[-1] - (4 if together == 4 else 0)
    elements, scales = slots[..., :head_dim], slots[..., head_dim:]
    heads = elements.shape[:-2]
    keys = elements.reshape(*heads, page_size, head_dim // together, together).swapaxes(-3, -2)
    values = elements.reshape(*heads, page_size // together, together, head_dim).swapaxes(-2, -1)
    flat = [np.ascontiguousarray(half).reshape(*heads, -1)[:, :, i] for i, half in enumerate((keys, values))]
    codes = np.stack(flat, axis=2).view(np.uint8)
    behind = np.ascontiguousarray(scales).view(np.uint8).reshape(*heads, -1)
    return np.concatenate([codes, behind], axis=-1)


def to_slots(planes: np.ndarray, dtype: np.dtype, page_size: int, head_dim: int) -> np.ndarray:
    """The inverse. dtype: of the slots; uint8 is int8 with scales."""
    together, heads = _together(dtype), planes.shape[:-1]
    size = page_size * head_dim * dtype.itemsize
    elements = np.ascontiguousarray(planes[..., :size]).view(dtype)
    scales = np.ascontiguousarray(planes[..., size:]).view(dtype).reshape(*heads, page_size, -1)
    keys = elements.reshape(*heads, head_dim // together, page_size, together)[:, :, 0].swapaxes(-3, -2)
    values = elements.reshape(*heads, page_size // together, head_dim, together)[:, :, 1].swapaxes(-2, -1)
    shape = (*heads[:2], heads[3], page_size, head_dim)
    both = np.stack([keys.reshape(shape), values.reshape(shape)], axis=2)
    return np.concatenate([both, scales], axis=-1)
