"""The pages of the native kernels, as pages.inl describes them: planes of words of 32 bits."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

ELEMENTS: Final[dict[str, np.dtype[np.unsignedinteger]]] = {
    "float32": np.dtype(np.uint32),
    "bfloat16": np.dtype(np.uint16),
    "int8": np.dtype(np.uint8),
}


class Planes:
    """A pool of `kv_dtype`, float32, bfloat16 or int8, as views that share its memory."""

    def __init__(
        self,
        pool: memoryview,
        kv_dtype: str,
        pages: int,
        layers: int,
        kv_heads: int,
        page_size: int,
        head_dim: int,
    ) -> None:
        """page_size and head_dim are multiples of 4. Raises ValueError."""
        if page_size % 4 or head_dim % 4:
            raise ValueError(f"pages of {page_size} tokens and heads of {head_dim} are no multiples of 4")
        element = ELEMENTS[kv_dtype]
        together = 4 // element.itemsize
        codes = page_size * head_dim * element.itemsize
        plane = codes + (page_size * 4 if kv_dtype == "int8" else 0)
        shape = (pages, layers, 2, kv_heads, plane)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(pool, np.uint8, int(np.prod(shape))).reshape(shape)
        elements = self.bytes[..., :codes].view(element)
        heads = (pages, layers, kv_heads)
        # [pages, layers, kv_heads, head_dim / E, page_size, E]
        self.keys = elements[:, :, 0].reshape(*heads, head_dim // together, page_size, together)
        # [pages, layers, kv_heads, page_size / E, head_dim, E]
        self.values = elements[:, :, 1].reshape(*heads, page_size // together, head_dim, together)
        # [pages, layers, k and v, kv_heads, page_size], of int8; else the last is 0
        self.scales = self.bytes[..., codes:].view(np.float32)

    def copy_slots(self, source: int, target: int, count: int) -> None:
        """The first `count` slots of a page, in all layers and heads."""
        whole, rest = divmod(count, self.values.shape[-1])
        self.keys[target, ..., :count, :] = self.keys[source, ..., :count, :]
        self.values[target, :, :, :whole] = self.values[source, :, :, :whole]
        if rest:
            self.values[target, :, :, whole, :, :rest] = self.values[source, :, :, whole, :, :rest]
        self.scales[target, ..., :count] = self.scales[source, ..., :count]
