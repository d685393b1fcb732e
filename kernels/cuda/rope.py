"""Rotary embedding of Q and K, and the writing of K and V into the pages, in one launch."""

from __future__ import annotations

from typing import Final

import numpy as np

from kernels.cuda.device import Device, Grid, address
from kernels.cuda.elements import ELEMENTS, Dtype, KvDtype

_THREADS: Final = 128
_MAX_HEAD_DIM: Final = 512


class RopeAppend:
    """The step from the QKV product to attention, for one shape of layers.

    The halves of a head form the pairs that are rotated, in float32, as Hugging Face's Llama does. qk_norm: Q and K
    pass an RMSNorm over the head before that, rounded as in `norm.cu`.
    Raises ValueError when head_dim is no multiple of 16 up to 512.
    """

    def __init__(
        self,
        device: Device,
        heads: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: Dtype,
        kv_dtype: KvDtype,
        qk_norm: bool = False,
        eps: float = 0.0,
    ) -> None:
        if head_dim % 16 or not 0 < head_dim <= _MAX_HEAD_DIM:
            raise ValueError(f"heads of {head_dim} elements; a multiple of 16 up to {_MAX_HEAD_DIM} is needed")
        defines: dict[str, int | str] = {
            "DTYPE": ELEMENTS[dtype].c_type,
            "KV_DTYPE": ELEMENTS[kv_dtype].c_type,
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "HEAD_DIM": head_dim,
            "PAGE_SIZE": page_size,
            "QK_NORM": int(qk_norm),
        }
        used_lanes = head_dim // 16
        self._lanes = max(4, 1 << (used_lanes - 1).bit_length())
        self._rows = heads + 2 * kv_heads
        self._qk_norm = qk_norm
        self._epsilon = np.float32(eps)
        self._kernel = device.kernel("rope_append.cu", "rope_append", defines, _THREADS)

    def launch(
        self,
        *,
        qkv: int,
        q_out: int,
        cosines: int,
        sines: int,
        positions: int,
        slots: int,
        pool: int,
        page_stride: int,
        half_stride: int,
        k_scale: int = 0,
        v_scale: int = 0,
        q_norm: int = 0,
        k_norm: int = 0,
        tokens: int,
    ) -> None:
        """All by address, aligned to 16 bytes; strides in bytes.

        qkv: [tokens, heads + 2 * kv_heads, head_dim], q_out: [tokens, heads, head_dim], both `dtype`.
        cosines, sines: float32 [positions, head_dim / 2]. positions: int32 [tokens].
        slots: int64 [tokens], page * page_size + slot in the page; negative: K and V of the token are not written.
        pool: the layer's part of page 0. k_scale, v_scale: float32 [kv_heads], what is stored times the scale is the
        value; 0: ones. q_norm, k_norm: float32 [head_dim], needed with qk_norm and ignored without.
        """
        if self._qk_norm and not (q_norm and k_norm):
            raise ValueError("qk_norm needs the weights of both norms")
        self._kernel.launch(
            Grid(-(-tokens * self._rows * self._lanes // _THREADS)),
            (
                address(qkv),
                address(q_out),
                address(cosines),
                address(sines),
                address(positions),
                address(slots),
                address(pool),
                np.int64(page_stride),
                np.int64(half_stride),
                address(k_scale),
                address(v_scale),
                address(q_norm),
                address(k_norm),
                self._epsilon,
                np.int32(tokens),
            ),
        )
