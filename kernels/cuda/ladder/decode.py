"""The earlier versions of decode attention, launched as the last is."""

from __future__ import annotations

from typing import Literal

from kernels.cuda.attention import THREADS, TILE, AttentionKernel, AttentionShape, shape_defines
from kernels.cuda.device import Device
from kernels.cuda.elements import ELEMENTS


class LadderDecode(AttentionKernel):
    """Version 1 or 2; the plan must not split (`resident_items` is 1 for that). No window, soft cap or ALiBi."""

    def __init__(self, device: Device, shape: AttentionShape, version: Literal[1, 2]) -> None:
        if shape.window or shape.softcap or shape.alibi:
            raise ValueError("window, soft cap and ALiBi came with version 3")
        chunks = shape.head_dim * ELEMENTS[shape.kv_dtype].itemsize // 16
        tile = 2 * TILE * (chunks | 1) * 16 + 16 * (shape.head_dim * 2 + 16)
        merge = 4 * 16 * ((shape.head_dim + 8) * 4 + 8)
        name = f"paged_decode_v{version}"
        shared = max(tile, merge) if version == 2 else 0
        kernel = device.kernel(f"ladder/{name}.cu", name, shape_defines(shape), THREADS, shared)
        columns = shape.heads if version == 1 else shape.kv_heads * -(-shape.group // 16)
        rows = 1 if version == 1 else max(1, 16 // shape.group)
        super().__init__(kernel, device, shape, "decode", rows, columns)
        self.resident_items = 1
