"""Which block works on which queries and keys: the plan of a step, made once on the host for all layers.

A *span* is the consecutive tokens of one sequence in the step. Spans are cut into *units*, the queries of one block;
the keys that a unit sees are cut into *splits*; a (unit, split) is a work *item*:

    queries  int32 [tokens, 4]   position, table row, first partial, splits
    items    int32 [items, 8]    first query, queries, first key, end of keys, split, table row, valid, 0

A query of one split is written by its item. Of a query of several, item `split` writes the partial `first partial +
split`, and the block that arrives last adds them in that order. Every (query, key) that must be seen lies in exactly
one item. The queries of an item all have one split or all have several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

TILE: Final = 64  # tokens
# Tiles that a split has at most, largest first; the smallest is 128 tokens (FlashInfer's minimum as well).
CANDIDATES: Final = np.array([4096, 2048, 1024, 512, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2])
# What starting and merging an item costs, in tiles: 0.7 to 1.4 on one H200.
ITEM_COST: Final = 1


class Spans(NamedTuple):
    """int64 [spans] each: a span's first token in the step, its position, its tokens, its block-table row."""

    first_token: I64
    position: I64
    tokens: I64
    table_row: I64


class SharedPrefix(NamedTuple):
    """The spans [first, end), whose tokens are adjacent, have the same pages for their first `tokens` positions."""

    first: int
    end: int
    tokens: int


@dataclass(frozen=True, slots=True)
class KindLimits:
    """queries: of one item. resident_items: that the device works on at once. max_items: capacity."""

    queries: int
    resident_items: int
    max_items: int


@dataclass(frozen=True, slots=True)
class CascadeRule:
    """When a shared prefix is read once for many queries: if that saves more than `threshold` seconds a layer.

    token_bytes: of keys and values in one layer. bandwidth: bytes/s of the device's memory. Below 5-8 us the second
    launch and the merge cost more than they save (FlashInfer issue 595, TensorRT-LLM pull request 14396).
    """

    token_bytes: int
    bandwidth: float
    threshold: float = 8e-6

    def pays(self, reads_saved: int, tokens: int) -> bool:
        return reads_saved * tokens * self.token_bytes > self.threshold * self.bandwidth


class PlanCounts(NamedTuple):
    """Items and partials in use."""

    decode_items: int
    append_items: int
    partials: int


class PlanArrays(NamedTuple):
    """What a plan is written to: int32 arrays of the capacities, perhaps views of staging memory."""

    queries: I32
    decode: I32
    append: I32


class _Units(NamedTuple):
    """int64 [units] each. offset: splits of the queries that come before this unit's own."""

    query_first: I64
    queries: I64
    kv_first: I64
    kv_end: I64
    table_row: I64
    offset: I64


_NONE: Final = _Units(*np.zeros((6, 0), np.int64))


class _Cut(NamedTuple):
    """Splits of units: `splits` [units] pieces of `piece` tiles, the first from tile `tile` on; partials: of all."""

    units: _Units
    tile: I64
    piece: I64
    splits: I64
    partials: int


class AttentionPlanner:
    """Makes the plans of one model's attention.

    decode: None where everything goes through the append kernel. window: positions that a query sees, 0: all.
    fixed_split: tokens, a multiple of 64: splits lie at its multiples, so that no result depends on the batch or on
    how a prompt was cut into chunks; 0: as many splits as fill the device. max_partials: capacity.
    """

    def __init__(
        self,
        *,
        decode: KindLimits | None,
        append: KindLimits,
        max_partials: int,
        window: int = 0,
        fixed_split: int = 0,
        cascade: CascadeRule | None = None,
    ) -> None:
        if fixed_split % TILE:
            raise ValueError(f"splits of {fixed_split} tokens: must be a multiple of {TILE}")
        self._decode = decode
        self._append = append
        self._max_partials = max_partials
        self._window = window
        self._fixed_split = fixed_split
        self._cascade = None if window or fixed_split else cascade

    def plan(self, spans: Spans, arrays: PlanArrays, prefixes: Sequence[SharedPrefix] = ()) -> PlanCounts:
        """Writes the plan of a step; items beyond those in use become invalid.

        Spans do not overlap; a token that is in none stays as it was in arrays.queries. Prefixes do not overlap
        either, and no span lies within its prefix; they are used where the cascade rule says so.
        Raises ValueError where even unsplit items exceed a capacity.
        """
        kv_first, prefix = self._prefix_units(spans, prefixes)
        splits = np.zeros(len(arrays.queries), np.int64)
        sharing = int(prefix.queries.sum())  # each of these has at least one more partial, of what follows the prefix
        prefix_cut = self._cut(prefix, self._append, self._max_partials - sharing, whole=False)
        _add(splits, prefix_cut)

        small = spans.tokens <= (self._decode.queries if self._decode else 0)
        append = self._units(spans, kv_first, splits, ~small, self._append.queries)
        append_cut = self._cut(append, self._append, self._max_partials - prefix_cut.partials - sharing)
        decode = self._units(spans, kv_first, splits, small, self._decode.queries if self._decode else 1)
        _add(splits, append_cut)
        append_cut = _joined(prefix_cut, append_cut)
        decode_cut = self._cut(decode, self._decode or self._append, self._max_partials - append_cut.partials)
        _add(splits, decode_cut)
        partials = self._write_queries(spans, splits, arrays.queries)
        return PlanCounts(_write_items(decode_cut, arrays.decode), _write_items(append_cut, arrays.append), partials)

    def _prefix_units(self, spans: Spans, prefixes: Sequence[SharedPrefix]) -> tuple[I64, _Units]:
        """The first key [spans] that is left to each span, and the units that read the prefixes that pay."""
        kv_first = np.zeros(len(spans.tokens), np.int64)
        rows: list[tuple[int, ...]] = []
        queries = self._append.queries
        budget = self._max_partials
        for prefix in prefixes if self._cascade is not None else ():
            tokens = prefix.tokens // TILE * TILE  # a tile is read by one side only
            count = int(spans.tokens[prefix.first : prefix.end].sum())
            saved = prefix.end - prefix.first - -(-count // queries)
            if self._cascade is not None and self._cascade.pays(saved, tokens) and 2 * count <= budget:
                budget -= 2 * count
                kv_first[prefix.first : prefix.end] = tokens
                first, row = int(spans.first_token[prefix.first]), int(spans.table_row[prefix.first])
                rows += [(first + i, min(queries, count - i), 0, tokens, row, 0) for i in range(0, count, queries)]
        return kv_first, _Units(*np.array(rows, np.int64).T) if rows else _NONE

    def _units(self, spans: Spans, kv_first: I64, splits: I64, chosen: npt.NDArray[np.bool_], queries: int) -> _Units:
        """The units of some spans. kv_first [spans], splits [tokens]: what a prefix leaves and what it took."""
        if not chosen.any():
            return _NONE
        first_token, position, count, table_row = (values[chosen] for values in spans)
        units = -(-count // queries)
        ends = np.cumsum(units)
        span = np.repeat(np.arange(len(count)), units)
        before = (np.arange(len(span)) - np.repeat(ends - units, units)) * queries
        size = np.minimum(queries, count[span] - before)
        start = position[span] + before
        lowest = np.maximum(kv_first[chosen][span], start - self._window + 1 if self._window else 0)
        return _Units(
            first_token[span] + before, size, lowest, start + size, table_row[span], splits[first_token[span] + before]
        )

    def _cut(self, units: _Units, limits: KindLimits, max_partials: int, whole: bool = True) -> _Cut:
        """whole: a unit of one split writes the output of its queries, unless a prefix wrote a part."""
        if not len(units.queries):
            return _Cut(units, units.offset, units.offset, units.offset, 0)
        partial = (units.offset > 0) if whole else np.ones(len(units.offset), np.bool_)
        if self._fixed_split:
            tile = units.kv_first // self._fixed_split * (self._fixed_split // TILE)
            piece = np.full_like(tile, self._fixed_split // TILE)
        else:
            tile = units.kv_first // TILE
            piece = _balanced(-(-units.kv_end // TILE) - tile, units.queries, partial, limits, max_partials)
        splits = -(-(-(-units.kv_end // TILE) - tile) // piece)
        partials = int(np.where(partial | (splits > 1), splits * units.queries, 0).sum())
        return _Cut(units, tile, piece, splits, partials)

    def _write_queries(self, spans: Spans, splits: I64, queries: I32) -> int:
        span = np.repeat(np.arange(len(spans.tokens)), spans.tokens)
        within = np.arange(len(span)) - np.repeat(np.cumsum(spans.tokens) - spans.tokens, spans.tokens)
        tokens = spans.first_token[span] + within
        own = splits[tokens]
        slots = np.where(own > 1, own, 0)
        ends = np.cumsum(slots)
        partials = int(ends[-1]) if len(ends) else 0
        if partials > self._max_partials:
            raise ValueError(f"{partials} partial results do not fit into {self._max_partials}")
        queries[tokens] = np.stack([spans.position[span] + within, spans.table_row[span], ends - slots, own], axis=1)
        return partials


def _balanced(tiles: I64, queries: I64, partial: npt.NDArray[np.bool_], limits: KindLimits, max_partials: int) -> I64:
    """Tiles [units] of a piece, such that the last item ends as early as possible; of equals, with fewest splits.

    partial [units]: even one split is a partial result.
    The time is estimated in tiles: rounds of resident items times the mean item, at least the longest item.
    """
    longest = int(tiles.max())
    most = np.concatenate(([longest], CANDIDATES[longest > CANDIDATES]))[:, None]
    piece = -(-tiles // -(-tiles // most))  # pieces of a unit are alike
    splits = -(-tiles // piece)
    items = splits.sum(axis=1)
    rounds = -(-items // limits.resident_items)
    cost = np.maximum(rounds * ((piece * splits).sum(axis=1) / items + ITEM_COST), piece.max(axis=1) + ITEM_COST)
    partials = np.where(partial | (splits > 1), splits * queries, 0).sum(axis=1)
    cost[(items > limits.max_items) | (partials > max_partials)] = np.inf
    best: I64 = piece[int(np.argmin(cost))]
    return best


def _joined(first: _Cut, second: _Cut) -> _Cut:
    units = _Units(*(np.concatenate(both) for both in zip(first.units, second.units, strict=True)))
    tile, piece, splits = (np.concatenate(both) for both in zip(first[1:4], second[1:4], strict=True))
    return _Cut(units, tile, piece, splits, first.partials + second.partials)


def _add(splits: I64, cut: _Cut) -> None:
    """Adds the splits of units to those of their queries, splits [tokens]."""
    if not len(cut.splits):
        return
    counts = cut.units.queries
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    splits[np.repeat(cut.units.query_first, counts) + within] += np.repeat(cut.splits, counts)


def _write_items(cut: _Cut, items: I32) -> int:
    """Long items first: the short ones fill the last round."""
    order = np.argsort(-cut.piece, kind="stable")
    splits = cut.splits[order]
    count = int(splits.sum())
    if count > len(items):
        raise ValueError(f"{count} work items do not fit into {len(items)}")
    unit = np.repeat(order, splits)
    split = np.arange(count) - np.repeat(np.cumsum(splits) - splits, splits)
    start = (cut.tile[unit] + split * cut.piece[unit]) * TILE
    units = cut.units
    items[:count, 0] = units.query_first[unit]
    items[:count, 1] = units.queries[unit]
    items[:count, 2] = np.maximum(units.kv_first[unit], start)
    items[:count, 3] = np.minimum(units.kv_end[unit], start + cut.piece[unit] * TILE)
    items[:count, 4] = units.offset[unit] + split
    items[:count, 5] = units.table_row[unit]
    items[:count, 6] = 1
    items[:count, 7] = 0
    items[count:, 6] = 0
    return count
