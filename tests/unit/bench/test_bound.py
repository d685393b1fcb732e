"""Worked out by hand: layers 2, hidden 8, intermediate 16, heads 4, K/V heads 2 of 2, vocabulary 32."""

from __future__ import annotations

import pytest
from peers_lib.bound import Rates, Shape, bound

from tests.unit.bench.results import SHAPE

LAYERS = 2 * (8 * 2 * (2 * 4 + 2 * 2) + 3 * 8 * 16)  # 1152 numbers
HEAD = 8 * 32
WEIGHTS = 2 * (LAYERS + HEAD)  # bytes
KV = 2 * 2 * 2 * 2 * 2  # bytes a token
PAIR = 4 * 2 * 4 * 2  # FLOP of one query over one key

FAST_MEMORY = Rates(flop=1.0, bytes=1e12)
FAST_PRODUCTS = Rates(flop=1e12, bytes=1.0)


def test_the_parts_of_a_shape() -> None:
    assert (SHAPE.layer_numbers, SHAPE.head_numbers, SHAPE.weight_bytes) == (LAYERS, HEAD, WEIGHTS)
    assert (SHAPE.kv_bytes, SHAPE.attention_flop) == (KV, PAIR)


def test_the_default_model_has_its_known_size() -> None:
    smol = Shape(layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152)
    assert smol.layer_numbers + smol.head_numbers == pytest.approx(134.5e6, rel=0.001)
    assert smol.kv_bytes == 23040


def test_products_alone() -> None:
    found = bound(SHAPE, [3, 5], 3, FAST_MEMORY)
    assert found.prompts == 2 * LAYERS * 8 + 2 * HEAD * 2 + PAIR * (6 + 15)
    products = 2 * (LAYERS + HEAD) * 2
    assert found.steps == (products + PAIR * (8 + 2)) + (products + PAIR * (8 + 4))
    assert found.tokens == 6
    assert found.tokens_per_second == 6 / (found.prompts + found.steps)


def test_bytes_alone() -> None:
    found = bound(SHAPE, [3, 5], 3, FAST_PRODUCTS)
    assert found.prompts == WEIGHTS + KV * 8
    assert found.steps == (WEIGHTS + KV * 10) + (WEIGHTS + KV * 12)
    assert found.step == WEIGHTS + KV * 12


def test_each_phase_takes_the_slower_of_both() -> None:
    # So many products a byte that the prompt is bound by products, and a step by bytes.
    rates = Rates(flop=4.0, bytes=1.0)
    found = bound(SHAPE, [40], 2, rates)
    assert found.prompts == pytest.approx(bound(SHAPE, [40], 2, FAST_MEMORY).prompts / 4)
    assert found.steps == bound(SHAPE, [40], 2, FAST_PRODUCTS).steps


def test_nothing_has_no_bound() -> None:
    for prompts, tokens in (([], 1), ([1], 0)):
        with pytest.raises(ValueError, match="one prompt or more"):
            bound(SHAPE, prompts, tokens, FAST_MEMORY)
    assert bound(SHAPE, [1], 1, FAST_MEMORY).steps == 0
