"""Attention over random pages: what a kernel gets, what it must give, and how far off it is.

Slots that no query may see are NaN, block-table entries that must not be used lead far away, counters must be zeros
again at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels import reference
from kernels.cuda.attention import AttentionKernel, AttentionShape, LayerPages, PlanMemory
from kernels.cuda.attention_plan import (
    AttentionPlanner,
    CascadeRule,
    KindLimits,
    PlanArrays,
    PlanCounts,
    SharedPrefix,
    Spans,
)
from tests.kernels.cuda.tensors import TORCH

LAYERS, LAYER = 2, 1
WILD = 0x3FFF_FFFF  # a page id that nothing must be read from
SLACK = 5  # tokens of the step that belong to no span

Span = tuple[int, int]  # position, tokens


@dataclass(frozen=True)
class Capacity:
    items: int = 64
    partials: int = 256


class Sequences:
    """Sequences with K and V in a pool, and the step's queries.

    spans: position and tokens of each. shared: positions that all have in common. layer_major: the pool's layout.
    """

    def __init__(
        self, shape: AttentionShape, spans: Sequence[Span], *, seed: int = 0, shared: int = 0, layer_major: bool = False
    ) -> None:
        self.shape = shape
        self.spans = spans
        generator = np.random.default_rng(seed)
        size, dim = shape.page_size, shape.head_dim
        needed = [-(-(start + count) // size) for start, count in spans]
        common = shared // size
        pages = common + sum(n - common for n in needed) + 3
        ids = list(generator.permutation(pages))
        stride = max(needed) + 2
        self.tables = np.full((len(spans) + 1, stride), WILD, np.int32)
        first_pages = [ids.pop() for _ in range(common)]
        poison = torch.full((pages, LAYERS, 2, shape.kv_heads, size, dim), float("nan")).to(TORCH[shape.kv_dtype])
        values = torch.tensor(generator.standard_normal(poison.shape, np.float32))
        values[:, :, 1] += 0.5  # so that weights that do not add up to 1 show
        fp8 = shape.kv_dtype == "fp8_e4m3"
        self.scales = torch.tensor(generator.uniform(0.01, 0.03, (2, shape.kv_heads)).astype(np.float32))
        if fp8:
            values = values / self.scales[None, None, :, :, None, None]
        self.pool = poison
        for row, (start, count) in enumerate(spans):
            own = first_pages + [ids.pop() for _ in range(needed[row] - common)]
            first = max(0, start + 1 - shape.window) if shape.window else 0
            for entry in range(first // size, needed[row]):
                self.tables[row, entry] = own[entry]
                slots = slice(max(0, first - entry * size), min(size, start + count - entry * size))
                self.pool[own[entry], LAYER, :, :, slots] = values[own[entry], LAYER, :, :, slots].to(self.pool.dtype)
        tokens = sum(count for _, count in spans) + SLACK
        # As the first part of wider rows, as a fused projection leaves them.
        wide = torch.tensor(generator.standard_normal((tokens, shape.heads + 2 * shape.kv_heads, dim), np.float32)) * 2
        self.queries = wide.to(TORCH[shape.dtype])[:, : shape.heads]
        self.slopes = torch.tensor(2.0 ** -generator.uniform(1, 8, shape.heads).astype(np.float32))
        self.step = numbers(spans)
        half = shape.kv_heads * size * dim * self.pool.element_size()
        self.layer_stride, self.page_stride = (
            (pages * 2 * half, 2 * half) if layer_major else (2 * half, LAYERS * 2 * half)
        )
        self.half_stride = half
        self.memory = (self.pool.transpose(0, 1) if layer_major else self.pool).contiguous()

    def part(self, spans: Sequence[tuple[int, int, int]]) -> Sequences:
        """The step of (sequence, position, tokens) among these positions; what comes later in a sequence is NaN."""
        part = copy.copy(self)
        part.spans = [(start, count) for _, start, count in spans]
        part.step = numbers(part.spans)
        part.tables = np.stack([self.tables[row] for row, _, _ in spans])
        offsets = [int(self.step.first_token[row]) + start - self.spans[row][0] for row, start, _ in spans]
        tokens = [offset + i for offset, (_, _, count) in zip(offsets, spans, strict=True) for i in range(count)]
        part.queries = self.queries[tokens + list(range(-SLACK, 0))]
        part.pool = self.pool.clone()
        for (row, start, count), table in zip(spans, part.tables, strict=True):
            for position in range(start + count, sum(self.spans[row])):
                page, slot = divmod(position, self.shape.page_size)
                part.pool[int(table[page]), LAYER, :, :, slot] = float("nan")
        part.memory = part.pool
        return part

    def expected(self) -> npt.NDArray[np.float64]:
        """[tokens of all spans, heads, head_dim]."""
        shape = self.shape
        pool = self.pool.double()
        if shape.kv_dtype == "fp8_e4m3":
            pool = pool * self.scales.double()[None, None, :, :, None, None]
        outputs = []
        for row, ((start, count), first) in enumerate(zip(self.spans, self.step.first_token, strict=True)):
            queries = self.queries[first : first + count].double().numpy()
            table = self.tables[row].astype(np.uint64)
            if shape.alibi:
                outputs.append(with_bias(queries, pool.numpy(), table, start, self.slopes.double().numpy()))
            else:
                outputs.append(
                    reference.paged_attention(queries, pool.numpy(), table, LAYER, start, shape.window, shape.softcap)
                )
        return np.concatenate(outputs)

    def run(
        self,
        kernels: Sequence[AttentionKernel],
        *,
        fixed_split: int = 0,
        prefixes: Sequence[SharedPrefix] = (),
        capacity: Capacity = Capacity(),
        resident_items: int | None = None,
    ) -> torch.Tensor:
        """Output [tokens, heads, head_dim] of the kernels, one of each kind at most, in this order."""
        shape = self.shape
        tokens = len(self.queries)
        limits = {k.kind: KindLimits(k.rows, resident_items or k.resident_items, capacity.items) for k in kernels}
        planner = AttentionPlanner(
            decode=limits.get("decode"),
            append=limits.get("append", KindLimits(1, 1, capacity.items)),
            max_partials=capacity.partials,
            window=shape.window,
            fixed_split=fixed_split,
            cascade=CascadeRule(shape.token_bytes, bandwidth=1.0) if prefixes else None,
        )
        arrays = PlanArrays(
            np.full((tokens, 4), -7, np.int32),
            np.full((capacity.items, 8), -7, np.int32),
            np.full((capacity.items, 8), -7, np.int32),
        )
        self.counts: PlanCounts = planner.plan(self.step, arrays, prefixes)
        partials = torch.full((capacity.partials, shape.heads, shape.head_dim), float("nan"))
        states = torch.full((capacity.partials, shape.heads, 2), float("nan"))
        counters = torch.zeros((tokens, shape.kv_heads), dtype=torch.int32)
        output = torch.full((tokens, shape.heads, shape.head_dim), 77.0, dtype=self.queries.dtype)
        plan = PlanMemory(
            arrays.queries.ctypes.data,
            self.tables.ctypes.data,
            self.tables.shape[1],
            partials.data_ptr(),
            states.data_ptr(),
            counters.data_ptr(),
        )
        pages = LayerPages(
            self.memory.data_ptr() + LAYER * self.layer_stride,
            self.page_stride,
            self.half_stride,
            self.scales[0].data_ptr(),
            self.scales[1].data_ptr(),
        )
        for kernel in kernels:
            items = arrays.decode if kernel.kind == "decode" else arrays.append
            kernel.launch(
                queries=self.queries.data_ptr(),
                output=output.data_ptr(),
                pages=pages,
                plan=plan,
                items=items.ctypes.data,
                item_count=len(items),
                slopes=self.slopes.data_ptr(),
                query_stride=self.queries.stride(0) * 2,
            )
        assert not counters.any()
        assert (output[tokens - SLACK :] == 77).all()
        return output[: tokens - SLACK]

    def error(self, output: torch.Tensor) -> float:
        """Largest difference, relative to the largest value of V (about 4.5)."""
        difference = np.abs(output.double().numpy() - self.expected())
        assert np.isfinite(difference).all()
        return float(difference.max() / 4.5)


def numbers(spans: Sequence[Span]) -> Spans:
    counts = np.array([count for _, count in spans])
    return Spans(np.cumsum(counts) - counts, np.array([start for start, _ in spans]), counts, np.arange(len(spans)))


def with_bias(
    queries: npt.NDArray[Any],
    pool: npt.NDArray[Any],
    row: npt.NDArray[np.uint64],
    start: int,
    slopes: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Attention with ALiBi (Press et al., ICLR 2022), float64."""
    count, heads, dim = queries.shape
    seen = np.arange(start + count)
    keys, values = (np.repeat(x, heads // pool.shape[3], axis=1) for x in reference.gather(pool, row, LAYER, seen))
    distance = seen - np.arange(start, start + count)[:, None]
    scores = np.einsum("qhd,khd->hqk", queries, keys) / np.sqrt(dim) + slopes[:, None, None] * distance
    scores = np.where(distance <= 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    output: npt.NDArray[np.float64] = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), values)
    return output
