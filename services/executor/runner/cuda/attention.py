"""The step's attention: which kernels, which plan, which scratch memory.

Decodes go through the kernel that reads keys as fast as the memory, prompts through the one for many queries.
Deterministic: everything through the latter, keys cut at fixed positions, so that a query's result depends on nothing
but its own sequence.

A graph has the number of its work items built in: as many as could be of use; those beyond the plan's end at once.
"""

from __future__ import annotations

from typing import Final

import torch

from kernels.cuda.attention import TILE, AttentionShape, LayerPages, PagedAttention, PlanMemory
from kernels.cuda.attention_plan import (
    AttentionPlanner,
    CascadeRule,
    KindLimits,
    PlanArrays,
    PlanCounts,
    SharedPrefix,
    Spans,
)
from kernels.cuda.elements import Dtype, KvDtype
from services.executor.modelstore.spec import DecoderSpec
from services.executor.runner.cuda.batch import Batch
from services.executor.runner.cuda.limits import Limits
from services.executor.runner.cuda.platform import Platform
from services.executor.runner.cuda.pool import Pool
from services.executor.runner.cuda.staging import DeviceStep, HostStep, StepShape

_ROUNDS: Final = 2  # of resident items that splits may add to a step
_LEAST_FIXED_SPLIT: Final = 512  # tokens
_MOST_FIXED_SPLITS: Final = 8  # of a sequence: each costs a partial result for every token of the step


class Attention:
    """Of one model. Makes plans, and launches them over the layers."""

    def __init__(
        self,
        platform: Platform,
        spec: DecoderSpec,
        limits: Limits,
        dtype: Dtype,
        kv_dtype: KvDtype,
        deterministic: bool,
    ) -> None:
        # A window that no sequence fills hides nothing.
        window = spec.sliding_window if spec.sliding_window < limits.max_model_len else 0
        shape = AttentionShape(
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            limits.page_size,
            dtype,
            kv_dtype,
            window,
            spec.logit_softcap,
        )
        self._limits, self._window = limits, window
        self._decode = None if deterministic else PagedAttention(platform.device, shape, "decode")
        self._append = PagedAttention(platform.device, shape, "append")
        self._fixed_split = fixed_split(limits.max_model_len) if deterministic else 0
        self._cascade = CascadeRule(shape.token_bytes, platform.bandwidth)
        self.shares_prefixes: Final = not (deterministic or window)
        """Whether keys that several decodes share are read once for all of them, where that pays."""
        slots = self._max_partials = self._partials()
        device = platform.torch_device
        self._sums = torch.zeros(slots, spec.heads, spec.head_dim, device=device)
        self._states = torch.zeros(slots, spec.heads, 2, device=device)
        self._counters = torch.zeros(limits.max_batch_tokens, spec.kv_heads, dtype=torch.int32, device=device)

    def _partials(self) -> int:
        """Partial results in a step at most: what the plans are allowed."""
        limits, append = self._limits, self._append
        if self._decode is None:
            return limits.max_batch_tokens * self._fixed_splits()
        # With a shared prefix every decode has two parts, unsplit.
        decodes = 2 * limits.max_rows + _ROUNDS * self._decode.resident_items
        return max(decodes, _ROUNDS * append.resident_items * append.rows)

    def _fixed_splits(self) -> int:
        """Of the longest sequence."""
        return -(-(self._limits.max_model_len + 1) // self._fixed_split)

    def graph_shape(self, size: int, shared: bool) -> StepShape:
        """Of a step of up to `size` decodes. shared: with room for items that read a prefix for many of them."""
        if self._decode is None:
            return StepShape(size, size, 0, size * self._fixed_splits())
        prefixes = size + _ROUNDS * self._append.resident_items if shared else 0
        return StepShape(size, size, size + _ROUNDS * self._decode.resident_items, prefixes)

    def shape_of(self, batch: Batch) -> StepShape:
        """What the plan of this batch fits into."""
        append = self._append
        units = int((-(-batch.counts // append.rows)).sum())
        if self._decode is None:
            return StepShape(batch.tokens, batch.spans, 0, units * self._fixed_splits())
        decodes = batch.spans + _ROUNDS * self._decode.resident_items
        return StepShape(batch.tokens, batch.spans, decodes, units + _ROUNDS * append.resident_items)

    def largest_shape(self) -> StepShape:
        """Nothing that `graph_shape` or `shape_of` return takes more bytes."""
        limits, append = self._limits, self._append
        tokens, rows = limits.max_batch_tokens, limits.max_rows
        units = tokens // append.rows + rows
        if self._decode is None:
            return StepShape(tokens, rows, 0, max(units, rows) * self._fixed_splits())
        decodes = rows + _ROUNDS * self._decode.resident_items
        return StepShape(tokens, rows, decodes, max(units, rows) + _ROUNDS * append.resident_items)

    def plan(self, batch: Batch, step: HostStep) -> PlanCounts:
        """Writes the step's queries and items."""
        decode, append = self._decode, self._append
        planner = AttentionPlanner(
            decode=KindLimits(decode.rows, decode.resident_items, len(step.decode_items)) if decode else None,
            append=KindLimits(append.rows, append.resident_items, len(step.append_items)),
            max_partials=self._max_partials,
            window=self._window,
            fixed_split=self._fixed_split,
            cascade=self._cascade,
        )
        spans = Spans(batch.firsts, batch.starts, batch.counts, batch.table_firsts)
        return planner.plan(spans, PlanArrays(step.queries, step.decode_items, step.append_items), batch.prefixes)

    def pays(self, prefix: SharedPrefix) -> bool:
        """Whether reading the prefix once is worth the items for it."""
        members = prefix.end - prefix.first
        return self._cascade.pays(members - -(-members // self._append.rows), prefix.tokens // TILE * TILE)

    def launch(self, step: DeviceStep, pool: Pool, layer: int, queries: int, output: int) -> None:
        """Enqueues one layer. queries, output: addresses of [tokens, heads, head_dim] in the compute type."""
        pages = LayerPages(
            pool.layer(layer), pool.strides.page, pool.strides.half, pool.k_scale(layer), pool.v_scale(layer)
        )
        plan = PlanMemory(
            queries=step.queries.data_ptr(),
            tables=step.tables.data_ptr(),
            table_stride=1,  # tables are packed: an item names its first entry
            partials=self._sums.data_ptr(),
            states=self._states.data_ptr(),
            counters=self._counters.data_ptr(),
        )
        for kernel, items, count in (
            (self._decode, step.decode_items, step.decode_count),
            (self._append, step.append_items, step.append_count),
        ):
            if kernel is not None and count:
                kernel.launch(
                    queries=queries,
                    output=output,
                    pages=pages,
                    plan=plan,
                    items=items.data_ptr(),
                    item_count=count,
                )


def fixed_split(max_model_len: int) -> int:
    """Tokens of a split in deterministic mode: a function of the settings alone."""
    tokens = max(_LEAST_FIXED_SPLIT, -(-max_model_len // _MOST_FIXED_SPLITS))
    return -(-tokens // TILE) * TILE
