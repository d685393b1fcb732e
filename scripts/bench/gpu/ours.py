"""Our paged attention over a case, in the shape that `gpu.peers` has for others."""

from __future__ import annotations

import time
from functools import partial
from typing import Final, Literal

import numpy as np
import torch

from gpu.bed import Bed, Launch
from gpu.peers import Case
from gpu.pool import Pool, expected
from kernels.cuda.attention import AttentionShape, Kind, LayerPages, PagedAttention, PlanMemory
from kernels.cuda.attention_plan import AttentionPlanner, KindLimits, PlanArrays, Spans
from kernels.cuda.elements import KvDtype
from kernels.cuda.ladder.decode import LadderDecode

KV_DTYPES: Final[dict[torch.dtype, KvDtype]] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float8_e4m3fn: "fp8_e4m3",
}
_MOST_ITEMS: Final = 1 << 15
_MOST_PARTIALS: Final = 1 << 14
_CHECKED: Final = 64


class Ours:
    """One kernel, with its plan and scratch memory for one case after the other. ladder: an earlier version's."""

    def __init__(self, bed: Bed, pool: Pool, heads: int, kind: Kind, ladder: Literal[1, 2] | None = None) -> None:
        shape = pool.shape
        self.bed, self.pool, self.kind = bed, pool, kind
        self.shape = AttentionShape(
            heads, shape.kv_heads, shape.head_dim, shape.page_size, "bfloat16", KV_DTYPES[shape.dtype]
        )
        self.kernel = (
            PagedAttention(bed.kernels, self.shape, kind)
            if ladder is None
            else LadderDecode(bed.kernels, self.shape, ladder)
        )
        limits = KindLimits(self.kernel.rows, self.kernel.resident_items, _MOST_ITEMS)
        nothing = KindLimits(self.kernel.rows, 1, 1)
        decode = kind == "decode"
        self.planner = AttentionPlanner(
            decode=limits if decode else None, append=nothing if decode else limits, max_partials=_MOST_PARTIALS
        )
        self.partials = torch.empty(_MOST_PARTIALS, heads, shape.head_dim, device=bed.torch_device)
        self.states = torch.empty(_MOST_PARTIALS, heads, 2, device=bed.torch_device)
        self._ones = torch.ones(shape.kv_heads, device=bed.torch_device)
        self.scales = self._ones.data_ptr() if shape.dtype == torch.float8_e4m3fn else 0
        self.plan_seconds = 0.0
        self.items = 0

    def prepare(self, case: Case) -> None:
        """Plans, and uploads plan and tables; a serving step does the same once for all its layers."""
        tokens = int(case.counts.sum())
        arrays = PlanArrays(*(np.zeros(size, np.int32) for size in ((tokens, 4), (_MOST_ITEMS, 8), (_MOST_ITEMS, 8))))
        rows = np.arange(len(case.counts), dtype=np.int64)
        firsts = case.query_starts[:-1].astype(np.int64)
        spans = Spans(firsts, case.contexts - case.counts, case.counts, rows)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            counts = self.planner.plan(spans, arrays)
            times.append(time.perf_counter() - began)
        self.plan_seconds = sorted(times)[len(times) // 2]
        self.items = counts.decode_items if self.kind == "decode" else counts.append_items
        items = arrays.decode if self.kind == "decode" else arrays.append
        self.uploaded = [
            torch.from_numpy(array).to(self.bed.torch_device)
            for array in (arrays.queries, items[: self.items].copy(), case.tables)
        ]
        self.counters = torch.zeros(tokens, self.shape.kv_heads, dtype=torch.int32, device=self.bed.torch_device)
        self.output = torch.full_like(case.queries, torch.nan)
        self.case = case

    def run(self, layer: int) -> torch.Tensor:
        """[tokens, heads, head_dim]; the same memory each time."""
        queries, items, tables = self.uploaded
        self.kernel.launch(
            queries=self.case.queries.data_ptr(),
            output=self.output.data_ptr(),
            pages=LayerPages(
                self.pool.address(layer), self.pool.page_stride, self.pool.half_stride, self.scales, self.scales
            ),
            plan=PlanMemory(
                queries.data_ptr(),
                tables.data_ptr(),
                tables.shape[1],
                self.partials.data_ptr(),
                self.states.data_ptr(),
                self.counters.data_ptr(),
            ),
            items=items.data_ptr(),
            item_count=self.items,
        )
        return self.output

    def error(self) -> float:
        """Relative, against float64: the worst of the first, middle and last sequence, of at most 64 queries each."""
        found = self.run(0)
        self.bed.synchronize()
        assert not found.isnan().any(), "there are rows that nobody wrote"
        case, worst, last = self.case, 0.0, len(self.case.counts) - 1
        for i in {0, last // 2, last}:
            end, count = int(case.query_starts[i + 1]), min(int(case.counts[i]), _CHECKED)
            mine = slice(end - count, end)
            keys_values = self.pool.keys_values(0)
            wanted = expected(case.queries[mine], *keys_values, case.tables[i], int(case.contexts[i]))
            worst = max(worst, float((found[mine].double() - wanted).norm() / wanted.norm()))
        return worst

    def launches(self, layers: range) -> list[Launch]:
        return [partial(self.run, layer) for layer in layers]
