"""Attention alone against the reference: any shape, every instruction set; what must not be read is NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.cpu.native import NativeSampling
from tests.kernels.variants import GROUPED, PLAIN, Pages, Sequence, Variant, as_chunks, stored

LAYERS = 2


@dataclass(frozen=True)
class Case:
    """One chunk over pages that hold what came before it."""

    head_dim: int
    kv_heads: int
    group: int
    page_size: int
    start: int
    count: int
    window: int
    softcap: float
    threads: int
    seed: int


cases = st.builds(
    Case,
    head_dim=st.sampled_from([32, 40, 64, 80, 96, 128, 256]),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 8]),
    page_size=st.sampled_from([8, 16, 24, 32, 64, 128]),
    start=st.one_of(st.integers(0, 20), st.integers(0, 400)),
    count=st.one_of(st.just(1), st.integers(1, 40)),
    window=st.sampled_from([0, 0, 1, 7, 64, 100]),
    softcap=st.sampled_from([0.0, 0.0, 3.0, 30.0]),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)


# Of the output, over max|V|: what rounding K and V to the type of the pages may do.
ROUNDING = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 3e-2}


@pytest.mark.parametrize("kv_dtype", ROUNDING)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(case=cases)
def test_attention_equals_the_reference(variant: Variant, kv_dtype: str, case: Case) -> None:
    error, rounding = errors(variant, "float32", kv_dtype, case)
    assert error <= 1e-5
    assert rounding <= ROUNDING[kv_dtype]


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(case=cases)
def test_attention_in_bfloat16_equals_the_reference(variant: Variant, kv_dtype: str, case: Case) -> None:
    error, rounding = errors(variant, "bfloat16", kv_dtype, case)
    assert error <= (1e-2 if kv_dtype == "bfloat16" else 4e-3)  # of int8 little but the output is rounded
    assert rounding <= ROUNDING[kv_dtype]


def test_what_int8_pages_hold_of_odd_values(variant: Variant) -> None:
    """To the byte: halves go to even codes, heads without values are zeros, one that is not finite poisons its own."""
    shape = replace(GROUPED, heads=3, kv_heads=3, qk_norm=False)
    rng = np.random.default_rng(7)
    values = rng.normal(size=(12, 2, 3, shape.head_dim)).astype(np.float32)
    values[1:4] *= np.float32([1e-29, 3e-31, 1e38])[:, None, None, None]
    values[4] = 0
    values[5] = rng.integers(-254, 255, values[5].shape) / 2  # scale 1: every other one is a half
    values[5, ..., 0] = 127
    values[6] = -values[5]
    values[7, 1, 2, 3], values[8, 0, 1, 9] = np.nan, -np.inf
    model = variant.attention(shape, "float32", "int8")
    try:
        pages = Pages(model, shape, "int8", 4, 16)
        lane = Sequence(np.zeros(12, np.uint32), pages.row(12), NativeSampling(PLAIN))
        qkv = np.concatenate([np.zeros((12, 1, 3, shape.head_dim), np.float32), values], axis=1).reshape(12, -1)
        model.attend(0, as_chunks([lane.chunk(0, 12)]), qkv)
    finally:
        model.close()
    held = pages.held(lane.row, 12)[:, 0]  # [12, k and v, kv_heads, ...]
    finite = np.isfinite(values).all(axis=-1)
    np.testing.assert_array_equal(held[finite], reference.int8_slots(values[finite]))
    assert not finite.all() and not np.isfinite(reference.int8_values(held[~finite])).any()


@pytest.mark.parametrize(
    ("kv_dtype", "odd"),
    [("bfloat16", "a query of zeros"), ("int8", "a query of zeros"), ("bfloat16", "an infinite value")],
)
def test_a_part_that_others_see_leaves_no_trace(variant: Variant, kv_dtype: str, odd: str) -> None:
    """Position 150 sees nothing before 131: with neighbours in its block that do, it has the same bits as alone."""
    shape = replace(GROUPED, heads=1, kv_heads=1, head_dim=64, sliding_window=20, max_positions=160, qk_norm=False)
    qkv = np.random.default_rng(3).normal(size=(160, 3 * shape.head_dim)).astype(np.float32)
    if odd == "a query of zeros":
        qkv[150, : shape.head_dim] = 0
    else:
        qkv[125, 2 * shape.head_dim + 5] = np.inf
    model = variant.attention(shape, "bfloat16", kv_dtype)
    try:
        pages = Pages(model, shape, kv_dtype, 12, 16)
        sequence = Sequence(np.zeros(160, np.uint32), pages.row(160), NativeSampling(PLAIN))
        together = model.attend(0, as_chunks([sequence.chunk(0, 160)]), qkv)[150]
        alone = model.attend(0, as_chunks([sequence.chunk(150, 1)]), qkv[150:151])[0]
    finally:
        model.close()
    assert np.isfinite(alone).all()
    np.testing.assert_array_equal(together, alone)


def errors(variant: Variant, dtype: str, kv_dtype: str, case: Case) -> tuple[float, float]:
    """Of the output over max|V|: against the reference over the pages, and over K and V before their rounding.

    Checks on the way that the new K and V are where they belong, and that nothing else was written.
    """
    shape = replace(
        GROUPED,
        layers=LAYERS,
        heads=case.kv_heads * case.group,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        max_positions=case.start + case.count,
        sliding_window=case.window,
        logit_softcap=case.softcap,
        qk_norm=False,
    )
    rng = np.random.default_rng(case.seed)
    layer, end = case.seed % LAYERS, case.start + case.count
    model = variant.attention(shape, dtype, kv_dtype, case.threads)
    try:
        entries = -(-end // case.page_size)
        pages = Pages(model, shape, kv_dtype, entries + 3, case.page_size)
        row = pages.row(end)
        if case.window:  # entries that every window has passed are given back: page 0 stands for "none"
            row[: max(0, case.start + 1 - case.window) // case.page_size] = 0
        exact = np.full((*pages.slots.shape[:-1], case.head_dim), np.nan, np.float32)
        new = rng.normal(size=(end, 2, case.kv_heads, case.head_dim)).astype(np.float32)
        positions = np.arange(max(0, case.start + 1 - case.window) if case.window else 0, end)
        ids = row.astype(np.uint32).astype(np.int64)[positions // case.page_size]
        exact[ids, layer, :, :, positions % case.page_size] = new[positions]
        given_pages, wanted_pages = pages.slots.copy(), pages.slots.copy()
        slots = (ids, layer, slice(None), slice(None), positions % case.page_size)
        wanted_pages[slots] = stored(exact[slots], kv_dtype)
        before = positions < case.start
        slots = (ids[before], layer, slice(None), slice(None), positions[before] % case.page_size)
        given_pages[slots] = wanted_pages[slots]
        pages.write(given_pages)

        queries = rng.normal(size=(case.count, shape.heads, case.head_dim)).astype(np.float32)
        parts = (queries, new[case.start :, 0], new[case.start :, 1])
        qkv = np.concatenate([part.reshape(case.count, -1) for part in parts], axis=1)
        sequence = Sequence(np.zeros(end, np.uint32), row, NativeSampling(PLAIN))
        got = model.attend(layer, as_chunks([sequence.chunk(case.start, case.count)]), qkv).reshape(queries.shape)
    finally:
        model.close()

    np.testing.assert_array_equal(pages.read().view(np.uint8), wanted_pages.view(np.uint8))
    scale = float(np.abs(new[positions, 1]).max())

    def error(pool: np.ndarray) -> float:
        wanted = reference.paged_attention(queries, pool, row, layer, case.start, case.window, case.softcap)
        return float(np.abs(got - wanted).max()) / scale  # NaN fails every comparison

    held = reference.int8_values(pages.slots) if kv_dtype == "int8" else pages.slots
    return error(held), error(exact)
