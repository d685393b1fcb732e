"""Plans: every key that a query must see is read once for it, and what the plan says fits what it may use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cuda.attention_plan import (
    TILE,
    AttentionPlanner,
    CascadeRule,
    KindLimits,
    PlanArrays,
    PlanCounts,
    SharedPrefix,
    Spans,
)

RULE = CascadeRule(token_bytes=1, bandwidth=1e6, threshold=100e-6)  # pays from 101 tokens' reads saved


@dataclass(frozen=True)
class Step:
    """spans: position, tokens. prefix: the first `sharing` spans share so many positions."""

    spans: list[tuple[int, int]]
    gap: int  # tokens of no span before the first
    sharing: int
    prefix: int
    decode: int | None  # queries of an item
    append: int
    resident_items: int
    window: int
    fixed_split: int
    max_items: int
    max_partials: int

    def planner(self) -> AttentionPlanner:
        return AttentionPlanner(
            decode=KindLimits(self.decode, self.resident_items, self.max_items) if self.decode else None,
            append=KindLimits(self.append, self.resident_items, self.max_items),
            max_partials=self.max_partials,
            window=self.window,
            fixed_split=self.fixed_split,
            cascade=RULE,
        )

    def numbers(self) -> Spans:
        position, tokens = np.array(self.spans, np.int64).reshape(-1, 2).T
        rows = np.arange(len(self.spans))[::-1].copy()
        return Spans(np.cumsum(tokens) - tokens + self.gap, position, tokens, rows)

    def arrays(self) -> PlanArrays:
        tokens = self.gap + sum(tokens for _, tokens in self.spans) + 3
        return PlanArrays(
            np.full((tokens, 4), -9, np.int32),
            np.full((self.max_items, 8), -9, np.int32),
            np.full((self.max_items, 8), -9, np.int32),
        )


@st.composite
def steps(draw: st.DrawFn) -> Step:
    sharing = draw(st.sampled_from([0, 0, 2, 9]))
    prefix = draw(st.sampled_from([1, 64, 130, 200])) if sharing else 0
    position = st.one_of(st.integers(0, 5), st.integers(0, 700), st.sampled_from([63, 64, 127, 128]))
    tokens = st.one_of(st.just(1), st.integers(1, 6), st.integers(1, 90))
    spans = draw(st.lists(st.tuples(position, tokens), min_size=sharing, max_size=max(12, sharing)))
    spans = [(start + prefix if i < sharing else start, n) for i, (start, n) in enumerate(spans)]
    return Step(
        spans=spans,
        gap=draw(st.sampled_from([0, 2])),
        sharing=sharing,
        prefix=prefix,
        decode=draw(st.sampled_from([None, 1, 4])),
        append=draw(st.sampled_from([1, 5, 32])),
        resident_items=draw(st.sampled_from([1, 4, 33, 264])),
        window=draw(st.sampled_from([0, 0, 1, 7, 64, 100])),
        fixed_split=draw(st.sampled_from([0, 0, 64, 256])),
        max_items=draw(st.sampled_from([40, 4000])),
        max_partials=draw(st.sampled_from([0, 60, 20000])),
    )


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(step=steps())
def test_every_key_is_read_once_for_every_query_that_sees_it(step: Step) -> None:
    spans, arrays = step.numbers(), step.arrays()
    prefixes = [SharedPrefix(0, step.sharing, step.prefix)] if step.sharing else []
    try:
        counts = step.planner().plan(spans, arrays, prefixes)
    except ValueError as error:
        assert "do not fit" in str(error)
        assert step.max_items == 40 or step.fixed_split
        return
    check(step, spans, arrays, counts)


def check(step: Step, spans: Spans, arrays: PlanArrays, counts: PlanCounts) -> None:
    used = [arrays.decode[: counts.decode_items], arrays.append[: counts.append_items]]
    assert (used[0][:, 6] == 1).all() and (used[1][:, 6] == 1).all()
    assert (arrays.decode[counts.decode_items :, 6] == 0).all()
    assert (arrays.append[counts.append_items :, 6] == 0).all()
    tokens = len(arrays.queries)
    positions = np.full(tokens, -1)
    for first, position, n, row in zip(*spans, strict=True):
        positions[first : first + n] = np.arange(position, position + n)
        assert (arrays.queries[first : first + n, 0] == positions[first : first + n]).all()
        assert (arrays.queries[first : first + n, 1] == row).all()
    covered = positions >= 0
    assert (arrays.queries[~covered] == -9).all()

    reads = np.zeros((tokens, positions.max(initial=0) + 1), int)
    splits: list[list[int]] = [[] for _ in range(tokens)]
    for kind, most in zip(used, (step.decode, step.append), strict=True):
        for first, n, kv_first, kv_end, split, row, _, zero in kind:
            assert most and 1 <= n <= most and 0 <= kv_first < kv_end and zero == 0
            queries = slice(first, first + n)
            assert covered[queries].all()
            reads[queries, kv_first:kv_end] += 1
            for query in range(first, first + n):
                splits[query].append(split)
            several = arrays.queries[queries, 3] > 1
            assert several.all() or not several.any()
            # An item that reads for one row only reads nothing that no query of it sees.
            if (arrays.queries[queries, 1] == row).all() and not step.fixed_split:
                assert kv_end <= positions[queries].max() + 1
            if step.window:
                assert kv_first >= positions[first] - step.window + 1
            if step.fixed_split:
                assert kv_first % step.fixed_split == 0 or step.window
                assert kv_first // step.fixed_split == (kv_end - 1) // step.fixed_split
    keys = np.arange(reads.shape[1])
    sees = (keys <= positions[:, None]) & ((keys > positions[:, None] - step.window) if step.window else True)
    assert (reads[sees] == 1).all()

    slots: list[int] = []
    for query in np.flatnonzero(covered):
        own = int(arrays.queries[query, 3])
        assert sorted(splits[query]) == list(range(own))
        if own > 1:
            slots += range(arrays.queries[query, 2], arrays.queries[query, 2] + own)
    assert len(set(slots)) == len(slots) == counts.partials <= step.max_partials
    assert all(0 <= slot < step.max_partials for slot in slots)


def one_step(spans: list[tuple[int, int]], **changes: object) -> Step:
    usual: dict[str, object] = {
        "gap": 0,
        "sharing": 0,
        "prefix": 0,
        "decode": 4,
        "append": 32,
        "resident_items": 33,
        "window": 0,
        "fixed_split": 0,
        "max_items": 2000,
        "max_partials": 2000,
    }
    return Step(spans, **{**usual, **changes})  # type: ignore[arg-type]


def planned(step: Step, prefixes: list[SharedPrefix] | None = None) -> tuple[PlanCounts, PlanArrays]:
    arrays = step.arrays()
    counts = step.planner().plan(step.numbers(), arrays, prefixes or [])
    check(step, step.numbers(), arrays, counts)
    return counts, arrays


def test_few_long_sequences_are_split_until_the_device_is_busy() -> None:
    counts, arrays = planned(one_step([(32 * 1024 - 1, 1)]))
    lengths = arrays.decode[: counts.decode_items, 3] - arrays.decode[: counts.decode_items, 2]
    assert 30 <= counts.decode_items <= 33
    assert lengths.max() - lengths.min() <= 16 * TILE


def test_a_round_that_is_nearly_full_is_not_split() -> None:
    assert planned(one_step([(4095, 1)] * 32))[0].decode_items == 32


def test_a_last_round_that_is_nearly_empty_is_avoided() -> None:
    counts, arrays = planned(one_step([(4095, 1)] * 40))
    rounds = -(-counts.decode_items // 33)
    longest = (arrays.decode[:, 3] - arrays.decode[:, 2])[: counts.decode_items].max()
    assert rounds * longest <= 1.2 * 40 * 4096 / 33 < 2 * 4096


def test_short_sequences_are_not_split() -> None:
    assert planned(one_step([(100, 1), (60, 1)]))[0] == PlanCounts(2, 0, 0)


def test_partials_that_do_not_fit_are_not_made() -> None:
    assert planned(one_step([(32 * 1024 - 1, 1)], max_partials=10))[0].decode_items <= 10
    assert planned(one_step([(32 * 1024 - 1, 1)], max_partials=0))[0] == PlanCounts(1, 0, 0)


def test_fixed_splits_of_a_query_do_not_depend_on_its_chunk() -> None:
    whole = planned(one_step([(0, 600), (3, 1)], decode=None, fixed_split=256))[1]
    later = planned(one_step([(512, 88)], decode=None, fixed_split=256))[1]
    bounds = {(kv_first, split) for _, _, kv_first, _, split, *_ in whole.append[whole.append[:, 6] == 1]}
    assert bounds == {(0, 0), (256, 1), (512, 2)}
    assert {(i[2], i[4]) for i in later.append[later.append[:, 6] == 1]} == bounds


def test_a_shared_prefix_is_read_by_whole_groups_where_that_pays() -> None:
    spans = [(300 + i, 1) for i in range(9)]
    counts, arrays = planned(one_step(spans, resident_items=1), [SharedPrefix(0, 9, 150)])
    assert counts == PlanCounts(9, 1, 18)
    assert arrays.append[0].tolist() == [0, 9, 0, 128, 0, 8, 1, 0]
    assert (arrays.decode[:9, 2] == 128).all() and (arrays.decode[:9, 4] == 1).all()
    assert planned(one_step(spans, resident_items=1, max_partials=17), [SharedPrefix(0, 9, 150)])[0].append_items == 0
    # 8 reads of 12 tokens saved, in whole tiles: none.
    assert planned(one_step(spans, resident_items=1), [SharedPrefix(0, 9, 12)])[0] == PlanCounts(9, 0, 0)
    # A window would cut prefixes off at different places, fixed splits must not depend on who shares.
    for changes in ({"window": 64}, {"fixed_split": 256}):
        assert planned(one_step(spans, **changes), [SharedPrefix(0, 9, 150)])[0].append_items == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="3 work items do not fit into 2"):
        planned(one_step([(0, 1)] * 3, max_items=2))
    with pytest.raises(ValueError, match="partial results do not fit into 2"):
        planned(one_step([(1000, 1)], fixed_split=64, max_partials=2))
    with pytest.raises(ValueError, match="multiple of 64"):
        one_step([], fixed_split=100).planner()
