"""Attention over paged keys and values on a device: `paged_decode.cu` and `paged_append.cu`.

Both run the work items of a plan (`attention_plan.py`). Where queries have items of both kinds, the kernels are
launched one after the other over the same plan: who arrives last adds the partial results up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np

from kernels.cuda.device import Device, Grid, Kernel, address
from kernels.cuda.elements import ELEMENTS, Dtype, KvDtype

Kind = Literal["decode", "append"]

TILE: Final = 64  # tokens
THREADS: Final = 128
HEAD_DIMS: Final = (64, 80, 96, 128, 256)
PAGE_SIZES: Final = (8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a model's attention is. window: positions that a query sees, 0: all. softcap: 0: none."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: Dtype
    kv_dtype: KvDtype
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"heads of {self.head_dim}; possible are {HEAD_DIMS}")
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"pages of {self.page_size} tokens; possible are {PAGE_SIZES}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads are no multiple of {self.kv_heads} KV heads")

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.kv_heads * self.head_dim * ELEMENTS[self.kv_dtype].itemsize


class LayerPages(NamedTuple):
    """One layer's pages: addresses and strides in bytes.

    address: of K of head 0 in page 0; a (page, head) is [page_size, head_dim], heads follow each other, V lies
    half_stride behind K. k_scale, v_scale, for fp8 pages: float32 [kv_heads], value = stored * scale.
    """

    address: int
    page_stride: int
    half_stride: int
    k_scale: int = 0
    v_scale: int = 0


class PlanMemory(NamedTuple):
    """Addresses of a plan on the device (`attention_plan.PlanArrays`) and of its scratch memory.

    tables: int32 [rows, table_stride] page ids. partials: float32 [slots, heads, head_dim]. states: float32
    [slots, heads, 2]. counters: uint32 [tokens, kv_heads], zero before the first launch and after each step.
    """

    queries: int
    tables: int
    table_stride: int
    partials: int
    states: int
    counters: int


class Blocks(NamedTuple):
    """How a kernel is built. shared_bytes: dynamic shared memory of a block."""

    stages: int
    resident: int
    shared_bytes: int


class AttentionKernel:
    """A kernel that runs the items of one kind; rows: queries of one item at most.

    resident_items: that the device works on at once, what splits are sized for.
    """

    def __init__(
        self, kernel: Kernel, device: Device, shape: AttentionShape, kind: Kind, rows: int, columns: int
    ) -> None:
        self.kind: Final = kind
        self.shape: Final = shape
        self.rows: Final = rows
        self.resident_items = max(1, kernel.blocks_per_multiprocessor * device.multiprocessors // columns)
        self._kernel = kernel
        self._columns = columns
        self._window = np.int32(shape.window)
        self._softcap = np.float32(shape.softcap)
        self._scale = np.float32(1 / math.sqrt(shape.head_dim))

    def launch(
        self,
        *,
        queries: int,
        output: int,
        pages: LayerPages,
        plan: PlanMemory,
        items: int,
        item_count: int,
        slopes: int = 0,
        query_stride: int = 0,
    ) -> None:
        """Enqueues the attention of one layer. May be captured: everything but the addresses is read on the device.

        queries: [tokens, heads, head_dim] of dtype at multiples of 16 bytes, tokens query_stride bytes apart, 0:
        contiguous. output: the same shape, contiguous; only tokens of valid items are written.
        items: int32 [item_count, 8] of the plan, 65535 at most. slopes: float32 [heads], for ALiBi.
        """
        shape = self.shape
        arguments = (
            address(queries),
            address(output),
            np.int64(query_stride or shape.heads * shape.head_dim * 2),
            address(pages.address),
            np.int64(pages.page_stride),
            np.int64(pages.half_stride),
            address(pages.k_scale),
            address(pages.v_scale),
            address(slopes),
            address(plan.queries),
            address(items),
            address(plan.tables),
            np.int32(plan.table_stride),
            address(plan.partials),
            address(plan.states),
            address(plan.counters),
            np.int32(shape.kv_heads),
            self._window,
            self._softcap,
            self._scale,
        )
        self._kernel.launch(Grid(self._columns, item_count), arguments)


class PagedAttention(AttentionKernel):
    """The attention kernel of one kind and shape.

    kind: "decode" for items of few rows, "append" for many. row_tiles: 16 rows of query x head in a block of "decode",
    64 in one of "append"; 1 or 2, the results are the same bits. By default 2 where the registers allow it and rows
    are many.
    """

    def __init__(self, device: Device, shape: AttentionShape, kind: Kind, row_tiles: int | None = None) -> None:
        if row_tiles is None:
            wide = shape.head_dim <= 128 and (kind == "append" or shape.group > 16)
            row_tiles = 2 if wide else 1
        rows = 16 * row_tiles * (1 if kind == "decode" else 4)
        blocks = fit(shape, kind, rows, device.compute_capability)
        defines = {
            **shape_defines(shape),
            "WINDOW": int(shape.window > 0),
            "SOFTCAP": int(shape.softcap > 0),
            "ALIBI": int(shape.alibi),
            "ROW_TILES": row_tiles,
            "STAGES": blocks.stages,
            "MIN_BLOCKS": blocks.resident,
        }
        name = f"paged_{kind}"
        kernel = device.kernel(f"{name}.cu", name, defines, THREADS, blocks.shared_bytes)
        columns = shape.kv_heads * -(-shape.group // rows)
        super().__init__(kernel, device, shape, kind, max(1, rows // shape.group), columns)


def shape_defines(shape: AttentionShape) -> dict[str, int | str]:
    """What every attention kernel is compiled for."""
    return {
        "HEAD_DIM": shape.head_dim,
        "PAGE_SIZE": shape.page_size,
        "GROUP": shape.group,
        "DTYPE": ELEMENTS[shape.dtype].c_type,
        "KV_DTYPE": ELEMENTS[shape.kv_dtype].c_type,
    }


def fit(shape: AttentionShape, kind: Kind, rows: int, compute_capability: int) -> Blocks:
    """decode: the stages and blocks that keep most bytes under way on a multiprocessor; of equals, most stages.

    append: two blocks on a multiprocessor where they fit, for one computes while the other waits; then most stages.
    """
    chunks = shape.head_dim * ELEMENTS[shape.kv_dtype].itemsize // 16
    stage = 2 * TILE * (chunks | 1) * 16
    queries = rows * (shape.head_dim * 2 + 16)
    columns = 4 if kind == "decode" else 1
    merge = columns * rows * ((shape.head_dim + 8) * 4 + 8) + rows * 4
    # Registers for three blocks where the accumulators are few.
    most = 3 if kind == "decode" and rows == 16 and shape.head_dim <= 128 else 2 if shape.head_dim <= 128 else 1
    possible = []
    for stages in (1, 2, 3, 4):
        shared = max(stages * stage + queries, merge)
        resident = min(most, _shared_memory(compute_capability) // (shared + 1024))  # 1 KiB a block is the system's
        if resident:
            possible.append(Blocks(stages, resident, shared))
    if not possible:
        raise ValueError(f"compute capability {compute_capability} has too little shared memory for {shape}")
    if kind == "decode":
        return max(possible, key=lambda blocks: (blocks.stages * blocks.resident, blocks.stages))
    return max(possible, key=lambda blocks: (blocks.stages > 1, blocks.resident, blocks.stages))


def _shared_memory(compute_capability: int) -> int:
    """Bytes of a multiprocessor ("Technical specifications per compute capability", CUDA C++ Programming Guide)."""
    kib = {80: 164, 87: 164, 90: 228, 100: 228, 103: 228}.get(compute_capability, 100)
    return kib * 1024
