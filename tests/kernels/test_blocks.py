"""Blocks of 4 and 8 bits: they compute what bfloat16 panels of the same values compute, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu.blocks import Blocks, joined, pack_blocks, pack_gate_up_blocks, round_to_int4, round_to_int8
from kernels.cpu.native import ModelShape, NativeModel
from kernels.cpu.packing import pack_gate_up, pack_linear
from tests.kernels.test_bit_exact import LENGTH, sequence
from tests.kernels.variants import GROUPED, WINDOWED, Pages, Variant, as_chunks, random_tensors

ROUND = {"int4": round_to_int4, "int8": round_to_int8}
MIXED = replace(GROUPED, tied_embeddings=True, hidden=96, intermediate=200)


def random_blocks(shape: ModelShape, encoding: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The same model with its matrices in blocks, and as bfloat16."""
    rng = np.random.default_rng(5)
    tensors = random_tensors(shape)
    kv, heads = shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim

    def matrix(outputs: int, inputs: int) -> tuple[Blocks, np.ndarray]:
        rounded = ROUND[encoding](rng.normal(0, 1.5 / np.sqrt(inputs), (outputs, inputs)).astype(np.float32))
        return rounded, rounded.values()[:, :inputs]

    blocks, plain = dict(tensors), dict(tensors)
    matrices = {"output_head": (shape.vocab, shape.hidden)}
    for i in range(shape.layers):
        prefix = f"layers.{i}."
        matrices[prefix + "qkv"] = (heads + 2 * kv, shape.hidden)
        matrices[prefix + "attention_output"] = (shape.hidden, heads)
        matrices[prefix + "down"] = (shape.hidden, shape.intermediate)
        gate, up = (matrix(shape.intermediate, shape.hidden) for _ in range(2))
        blocks[prefix + "gate_up"] = pack_gate_up_blocks(gate[0], up[0])
        plain[prefix + "gate_up"] = pack_gate_up(gate[1], up[1])
    for name, size in matrices.items():
        packed, values = matrix(*size)
        blocks[name], plain[name] = pack_blocks(packed), pack_linear(values)
    return blocks, plain


@pytest.mark.parametrize("encoding", ["int4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [GROUPED, WINDOWED, MIXED], ids=["grouped", "windowed", "tied"])
def test_logits_equal_those_of_the_same_values(variant: Variant, shape: ModelShape, dtype: str, encoding: str) -> None:
    results = []
    for tensors in random_blocks(shape, encoding):
        model = variant.model(shape, tensors, dtype, threads=2)
        pages = Pages(model, shape, dtype, 50, 16)
        lane = sequence(pages)
        results.append(model.logits(as_chunks([lane.chunk(0, LENGTH)])))
        model.close()
    assert results[0].std() > 0.1
    np.testing.assert_array_equal(results[0].view(np.uint32), results[1].view(np.uint32))


def in_pieces(model: NativeModel, shape: ModelShape, sizes: Iterable[int]) -> np.ndarray:
    """The logits of the sequence, computed so many positions at a time."""
    pages = Pages(model, shape, "bfloat16", 50, 16)
    lane = sequence(pages)
    borders = np.minimum(np.cumsum([0, *sizes]), LENGTH)
    chunks = [(int(start), int(end - start)) for start, end in pairwise(borders) if start < end]
    assert borders[-1] == LENGTH
    return np.concatenate([model.logits(as_chunks([lane.chunk(*chunk)])) for chunk in chunks])


@pytest.mark.parametrize("encoding", ["int4", "int8"])
def test_few_rows_compute_what_many_do(variant: Variant, encoding: str) -> None:
    """By blocks, or by bfloat16 and blocks for few rows where these are faster."""
    blocks, plain = random_blocks(MIXED, encoding)
    models = [
        variant.model(MIXED, plain, "bfloat16"),
        variant.model(MIXED, blocks, "bfloat16"),
        variant.model(MIXED, plain, "bfloat16", compact=blocks),
    ]
    expected = in_pieces(models[0], MIXED, [LENGTH])
    for model in models:
        found = in_pieces(model, MIXED, [*range(1, 14), *[1] * LENGTH])
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
        model.close()


def test_blocks_are_taken_for_few_rows_where_they_are_faster(variant: Variant) -> None:
    others = random_tensors(MIXED, seed=7)
    model = variant.model(MIXED, random_blocks(MIXED, "int4")[1], "bfloat16", compact=others)
    alone = variant.model(MIXED, random_blocks(MIXED, "int4")[1], "bfloat16")
    ways = [[LENGTH], [9] * 10 + [10] * 6, [8] * LENGTH]
    same = [np.array_equal(in_pieces(model, MIXED, way), in_pieces(alone, MIXED, way)) for way in ways]
    assert same == [True, True, variant.isa != "avx512bf16"]
    model.close()
    alone.close()


def test_more_rows_than_stay_in_the_cache(variant: Variant) -> None:
    shape = replace(GROUPED, layers=1, max_positions=1100)
    tensors = random_blocks(shape, "int4")[0]
    model = variant.model(shape, tensors, "bfloat16")
    tokens = np.random.default_rng(0).integers(0, shape.vocab, 1100).astype(np.uint32)
    logits = []
    for chunks in ([(0, 1100)], [(0, 500), (500, 33), (533, 567)]):
        pages = Pages(model, shape, "bfloat16", 100, 16)
        lane = replace(sequence(pages, length=1100), tokens=tokens)
        logits.append(np.concatenate([model.logits(as_chunks([lane.chunk(*chunk)])) for chunk in chunks]))
    np.testing.assert_array_equal(logits[0].view(np.uint32), logits[1].view(np.uint32))
    model.close()


matrices = st.builds(
    lambda seed, rows, columns, scale: np.random.default_rng(seed).normal(0, scale, (rows, columns)),
    st.integers(0, 1 << 30),
    st.integers(1, 40),
    st.integers(1, 100),
    st.sampled_from([1e-3, 0.05, 1.0, 30.0]),
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(weight=matrices)
def test_rounding_is_to_the_nearest_step(weight: np.ndarray) -> None:
    rows, columns = weight.shape
    for rounding, steps in ((round_to_int8, 254), (round_to_int4, 15)):
        blocks = rounding(weight.astype(ml_dtypes.bfloat16))
        assert blocks.shape == (rows, -(-columns // 32) * 32)
        values = blocks.values()[:, :columns].astype(np.float64)
        exact = weight.astype(ml_dtypes.bfloat16).astype(np.float64)
        size = np.repeat(np.ptp(np.pad(exact, ((0, 0), (0, -columns % 32))).reshape(rows, -1, 32), axis=-1), 32, axis=1)
        largest = 2 * np.abs(exact).max() if steps == 254 else size[:, :columns].max()
        # Half a step, the rounding of scale and least value to float16, and that of the weight to bfloat16.
        bound = largest / steps / 2 + (np.abs(exact).max() + largest) * 2**-9 + 6e-8 * 16
        assert np.abs(values - exact).max() <= bound


def test_all_zeros_stay_zeros() -> None:
    for rounding in ROUND.values():
        assert not rounding(np.zeros((3, 64), ml_dtypes.bfloat16)).values().astype(np.float32).any()


def test_only_blocks_of_one_kind_are_joined() -> None:
    weight = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    four, eight = round_to_int4(weight), round_to_int8(weight)
    assert joined([four, eight]) is None and joined([four, None]) is None
    both = joined([four, four])
    assert both is not None and both.shape == (8, 64)
    np.testing.assert_array_equal(both.values()[4:].view(np.uint16), four.values().view(np.uint16))
