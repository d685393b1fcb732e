"""Linears by integers: the codes, the rotation, and what all instruction sets make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu.integers import (
    Integers,
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


def integers(rng: np.random.Generator, outputs: int, inputs: int) -> Integers:
    return round_to_integers(rng.normal(0, 1.5 / np.sqrt(inputs), (outputs, inputs)).astype(np.float32))


def with_integers(shape: ModelShape) -> dict[str, np.ndarray]:
    """A random model whose matrices all are integers."""
    rng, tensors = np.random.default_rng(6), random_tensors(shape)
    kv, heads = shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim
    tensors["output_head"] = pack_integers(integers(rng, shape.vocab, shape.hidden))
    for i in range(shape.layers):
        gate, up = (integers(rng, shape.intermediate, shape.hidden) for _ in range(2))
        tensors |= {
            f"layers.{i}.qkv": pack_integers(integers(rng, heads + 2 * kv, shape.hidden)),
            f"layers.{i}.attention_output": pack_integers(integers(rng, shape.hidden, heads)),
            f"layers.{i}.gate_up": pack_gate_up_integers(gate, up),
            f"layers.{i}.down": pack_integers(integers(rng, shape.hidden, shape.intermediate)),
        }
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_depend_on_no_batch(variant: Variant, name: str, dtype: str) -> None:
    """Chunks of all sizes, other sequences beside them, 1 and 3 threads: bit for bit."""
    shape, found = SHAPES[name], []
    tensors = with_integers(shape)
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


def coded(rows: np.ndarray) -> np.ndarray:
    """Rows as their codes have them."""
    return round_to_integers(rows).values()


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def mlp_alone(shape: ModelShape) -> tuple[dict[str, np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """A model of one layer whose attention adds nothing, and the same in numpy: float32 logits of tokens."""
    rng, shape = np.random.default_rng(8), replace(shape, layers=1)
    tensors = random_tensors(shape)
    table = rng.normal(size=(shape.vocab, shape.hidden)).astype(ml_dtypes.bfloat16)
    gate, up = (integers(rng, shape.intermediate, shape.hidden) for _ in range(2))
    head, down = (integers(rng, n, k) for n, k in ((shape.vocab, shape.hidden), (shape.hidden, shape.intermediate)))
    nothing = np.zeros((shape.hidden, shape.heads * shape.head_dim), np.float32)
    tensors |= {
        "embedding": table.view(np.uint16),
        "output_head": pack_integers(head),
        "layers.0.attention_output": pack_integers(round_to_integers(nothing)),
        "layers.0.gate_up": pack_gate_up_integers(gate, up),
        "layers.0.down": pack_integers(down),
    }

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + shape.rms_norm_eps) * tensors[name]

    def logits(tokens: np.ndarray) -> np.ndarray:
        x = table[tokens].astype(np.float32)
        inputs = coded(norm(x, "layers.0.mlp_norm"))
        products = silu(inputs @ gate.values().T) * (inputs @ up.values().T)
        x = x + coded(rotate(products.astype(np.float32))) @ down.values().T
        return coded(norm(x, "final_norm").astype(np.float32)) @ head.values().T

    return tensors, logits


@pytest.mark.parametrize("name", ["grouped", "rotated"])
def test_every_instruction_set_computes_the_formula(variant: Variant, name: str) -> None:
    shape = replace(SHAPES[name], layers=1)
    tensors, expected = mlp_alone(shape)
    model = variant.model(shape, tensors, "float32")
    pages = Pages(model, shape, "float32", 50, 16)
    lane = sequence(pages)
    logits = model.logits(as_chunks([lane.chunk(0, LENGTH)]))
    model.close()
    error = logits - expected(lane.tokens)
    # A value at the edge of two codes may fall to either side.
    assert np.sqrt((error**2).mean()) < 2e-3 * logits.std()


@pytest.mark.parametrize("kind", ["zeros", "tiny", "huge"])
def test_odd_rows(variant: Variant, kind: str) -> None:
    """Rows of zeros stay zeros, and no scale of a row makes anything but numbers."""
    shape = replace(ROTATED, layers=1)
    tensors = mlp_alone(shape)[0]
    value = {"zeros": 0.0, "tiny": 1e-38, "huge": 1e18}[kind]
    tensors["final_norm"] = np.full(shape.hidden, value, np.float32)
    for dtype in ("float32", "bfloat16"):
        model = variant.model(shape, tensors, dtype)
        pages = Pages(model, shape, dtype, 50, 16)
        logits = model.logits(as_chunks([sequence(pages).chunk(0, 40)]))
        model.close()
        assert np.isfinite(logits).all() and logits.any() == (kind == "huge")


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
