"""Linears by integers, of whole outputs and in blocks: the codes, the rotation, and what all instruction sets make of
them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu.blocks import BLOCK, Blocks, round_to_int4, round_to_int8
from kernels.cpu.integer_blocks import pack_gate_up_integer_blocks, pack_integer_blocks
from kernels.cpu.integers import (
    counter_rotate,
    hadamard,
    pack_gate_up_integers,
    pack_integers,
    rotate,
    rotation,
    round_to_integers,
)
from kernels.cpu.native import ModelShape
from tests.kernels.test_bit_exact import LENGTH, sequence
from tests.kernels.variants import GROUPED, WINDOWED, Pages, Variant, as_chunks, random_tensors

ROTATED = replace(GROUPED, hidden=96, intermediate=1536)  # by 32; more inputs than one slice of a panel has
SHAPES = {"grouped": GROUPED, "tied": WINDOWED, "rotated": ROTATED}


def coded(rows: np.ndarray) -> np.ndarray:
    """Rows as their codes have them."""
    return round_to_integers(rows).values()


def coded_in_blocks(rows: np.ndarray) -> np.ndarray:
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK)))
    return coded(padded.reshape(-1, BLOCK)).reshape(padded.shape)[:, : rows.shape[1]]


def exact(blocks: Blocks) -> np.ndarray:
    """The weights as they are multiplied, float32 [N, K]."""
    codes = blocks.codes.astype(np.float32).reshape(*blocks.scales.shape, BLOCK)
    least = 0 if blocks.least is None else blocks.least.astype(np.float32)[..., None]
    return (codes * blocks.scales.astype(np.float32)[..., None] + least).reshape(blocks.shape)


@dataclass(frozen=True)
class Kind:
    """A way to multiply as integers."""

    round: Callable[[np.ndarray], Any]
    pack: Callable[[Any], np.ndarray]
    pack_gate_up: Callable[[Any, Any], np.ndarray]
    values: Callable[[Any], np.ndarray]
    inputs: Callable[[np.ndarray], np.ndarray]  # as they are multiplied
    rotates: bool

    def random(self, rng: np.random.Generator, outputs: int, inputs: int) -> Any:
        return self.round(rng.normal(0, 1.5 / np.sqrt(inputs), (outputs, inputs)).astype(np.float32))


def in_blocks(rounding: Callable[[np.ndarray], Blocks]) -> Kind:
    return Kind(rounding, pack_integer_blocks, pack_gate_up_integer_blocks, exact, coded_in_blocks, False)


KINDS = {
    "outputs": Kind(round_to_integers, pack_integers, pack_gate_up_integers, lambda m: m.values(), coded, True),
    "blocks4": in_blocks(round_to_int4),
    "blocks8": in_blocks(round_to_int8),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def with_integers(shape: ModelShape, kind: Kind) -> dict[str, np.ndarray]:
    """A random model whose matrices all are integers."""
    rng, tensors = np.random.default_rng(6), random_tensors(shape)
    kv, heads = shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim

    def matrix(outputs: int, inputs: int) -> np.ndarray:
        return kind.pack(kind.random(rng, outputs, inputs))

    tensors["output_head"] = matrix(shape.vocab, shape.hidden)
    for i in range(shape.layers):
        gate, up = (kind.random(rng, shape.intermediate, shape.hidden) for _ in range(2))
        tensors |= {
            f"layers.{i}.qkv": matrix(heads + 2 * kv, shape.hidden),
            f"layers.{i}.attention_output": matrix(shape.hidden, heads),
            f"layers.{i}.gate_up": kind.pack_gate_up(gate, up),
            f"layers.{i}.down": matrix(shape.hidden, shape.intermediate),
        }
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_depend_on_no_batch(variant: Variant, name: str, dtype: str, kind: Kind) -> None:
    """Chunks of all sizes, other sequences beside them, 1 and 3 threads: bit for bit."""
    shape, found = SHAPES[name], []
    tensors = with_integers(shape, kind)
    for threads, ends in ((1, [LENGTH]), (3, [1, 2, 5, 38, 90, LENGTH])):
        model = variant.model(shape, tensors, dtype, threads)
        pages = Pages(model, shape, dtype, 50, 16)
        lane, mate, logits = sequence(pages), sequence(pages, seed=1), []
        for start, end in zip([0, *ends], ends, strict=False):
            batch = [mate.chunk(start, min(end - start, 40)), lane.chunk(start, end - start)]
            logits.append(model.logits(as_chunks(batch))[-(end - start) :])
        found.append(np.concatenate(logits))
        model.close()
    assert found[0].std() > 0.1
    np.testing.assert_array_equal(found[0].view(np.uint32), found[1].view(np.uint32))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def mlp_alone(shape: ModelShape, kind: Kind) -> tuple[dict[str, np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """A model of one layer whose attention adds nothing, and the same in numpy: float32 logits of tokens."""
    rng, shape = np.random.default_rng(8), replace(shape, layers=1)
    tensors = random_tensors(shape)
    gate, up = (kind.random(rng, shape.intermediate, shape.hidden) for _ in range(2))
    head, down = (kind.random(rng, n, k) for n, k in ((shape.vocab, shape.hidden), (shape.hidden, shape.intermediate)))
    nothing = np.zeros((shape.hidden, shape.heads * shape.head_dim), np.float32)
    table = rng.normal(size=(shape.vocab, shape.hidden)).astype(ml_dtypes.bfloat16)
    if shape.tied_embeddings:
        table = kind.values(head)[:, : shape.hidden].astype(ml_dtypes.bfloat16)
    else:
        tensors["embedding"] = table.view(np.uint16)
    tensors |= {
        "output_head": kind.pack(head),
        "layers.0.attention_output": kind.pack(kind.round(nothing)),
        "layers.0.gate_up": kind.pack_gate_up(gate, up),
        "layers.0.down": kind.pack(down),
    }

    def product(rows: np.ndarray, matrix: Any) -> np.ndarray:
        return kind.inputs(rows.astype(np.float32)) @ kind.values(matrix)[:, : rows.shape[1]].T

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + shape.rms_norm_eps) * tensors[name]

    def logits(tokens: np.ndarray) -> np.ndarray:
        x = table[tokens].astype(np.float32)
        inputs = norm(x, "layers.0.mlp_norm")
        products = (silu(product(inputs, gate)) * product(inputs, up)).astype(np.float32)
        x = x + product(rotate(products) if kind.rotates else products, down)
        return product(norm(x, "final_norm"), head)

    return tensors, logits


@pytest.mark.parametrize("name", SHAPES)
def test_every_instruction_set_computes_the_formula(variant: Variant, name: str, kind: Kind) -> None:
    shape = replace(SHAPES[name], layers=1)
    tensors, expected = mlp_alone(shape, kind)
    model = variant.model(shape, tensors, "float32")
    pages = Pages(model, shape, "float32", 50, 16)
    lane = sequence(pages)
    logits = model.logits(as_chunks([lane.chunk(0, LENGTH)]))
    model.close()
    error = logits - expected(lane.tokens)
    # A value at the edge of two codes may fall to either side.
    assert np.sqrt((error**2).mean()) < 2e-3 * logits.std()


@pytest.mark.parametrize("size", ["zeros", "tiny", "huge"])
def test_odd_rows(variant: Variant, size: str, kind: Kind) -> None:
    """Rows of zeros stay zeros, and no scale of a row makes anything but numbers."""
    shape = replace(ROTATED, layers=1)
    tensors = mlp_alone(shape, kind)[0]
    value = {"zeros": 0.0, "tiny": 1e-38, "huge": 1e18}[size]
    tensors["final_norm"] = np.full(shape.hidden, value, np.float32)
    for dtype in ("float32", "bfloat16"):
        model = variant.model(shape, tensors, dtype)
        pages = Pages(model, shape, dtype, 50, 16)
        logits = model.logits(as_chunks([sequence(pages).chunk(0, 40)]))
        model.close()
        assert np.isfinite(logits).all() and logits.any() == (size == "huge")


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 1 << 30), rows=st.integers(1, 40), columns=st.integers(1, 100))
def test_rounding_is_to_the_nearest_code(seed: int, rows: int, columns: int) -> None:
    weight = np.random.default_rng(seed).normal(0, 0.1, (rows, columns)).astype(np.float32)
    largest = np.abs(weight).max(axis=1)
    error = np.abs(round_to_integers(weight).values() - weight).max(axis=1)
    assert (error <= largest / 254 * 1.001).all()
    assert (np.abs(round_to_integers(weight).codes).max(axis=1) == 127).all()


@pytest.mark.parametrize(("inputs", "width"), [(1536, 32), (112, 1), (96, 2), (4096, 32), (107, 1), (8960, 16)])
def test_rotating_both_sides_changes_no_product(inputs: int, width: int) -> None:
    rng = np.random.default_rng(inputs)
    rows, weight = (rng.normal(size=(5, inputs)).astype(np.float32) for _ in range(2))
    assert rotation(inputs) == width
    np.testing.assert_allclose(rotate(rows) @ counter_rotate(weight).T, rows @ weight.T, atol=1e-3)
    if width > 1:  # what one value has is spread over all
        alone = np.zeros((1, inputs), np.float32)
        alone[0, 16 * width - 1] = 1
        assert np.count_nonzero(rotate(alone)) == width


def test_the_matrix_is_sylvesters() -> None:
    columns = hadamard(np.eye(8, dtype=np.float32)[..., None])[..., 0]
    np.testing.assert_array_equal(columns, columns.T)
    np.testing.assert_array_equal(columns @ columns, 8 * np.eye(8))
    np.testing.assert_array_equal(columns[:4, 4:], columns[:4, :4])
    np.testing.assert_array_equal(columns[4:, 4:], -columns[:4, :4])
