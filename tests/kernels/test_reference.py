"""The reference itself: published vectors, and a second way to compute the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels import reference
from kernels.reference import Sampling

# Random123, tests/kat_vectors: philox4x32 10. Counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter: str, key: str, result: str) -> None:
    assert [int(word) for word in reference.philox4x32(words(counter), words(key))] == words(result)


def test_noise_is_finite_at_both_ends() -> None:
    noise = reference.gumbel(2**64 - 1, 5, 1, np.arange(1 << 16))
    assert noise.min() > -2.9 and noise.max() < 17.4
    assert abs(noise.mean() - np.euler_gamma) < 0.02


@pytest.mark.parametrize("window", [0, 5])
def test_attention_equals_torch(window: int) -> None:
    rng = np.random.default_rng(0)
    pool = rng.normal(size=(9, 2, 2, 2, 4, 8))
    row = np.array([3, 8, 1, 5], np.uint64) | np.uint64(77 << 32)
    start, count = 6, 5
    queries = rng.normal(size=(count, 6, 8))
    keys, values = reference.gather(pool, row, 1, np.arange(start + count))
    at = torch.arange(start, start + count)[:, None]
    mask = torch.arange(start + count) <= at
    if window:
        mask &= torch.arange(start + count) > at - window
    q, k, v = (torch.from_numpy(x).transpose(0, 1) for x in (queries, keys, values))
    wanted = F.scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=True)[0].transpose(0, 1)
    got = reference.paged_attention(queries, pool, row, 1, start, window, 0.0)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-12)


def test_soft_cap_bounds_the_scores() -> None:
    pool = np.ones((1, 1, 2, 1, 4, 2)) * np.array([0.0, 300.0, -300.0, 0.0])[:, None]
    got = reference.paged_attention(np.ones((1, 1, 2)), pool, np.zeros(1, np.uint64), 0, 3, 0, 2.0)
    weights = np.exp(2 * np.tanh(np.array([0.0, 300.0, -300.0, 0.0]) * np.sqrt(2) / 2))
    np.testing.assert_allclose(got[0, 0], (weights / weights.sum()) @ pool[0, 0, 1, 0])


def test_int8_slots_by_hand() -> None:
    slots = reference.int8_slots(np.array([[127, 0.5, 1.5, -2.5, -126.6], [0, 1e-31, 0, 0, 0]], np.float32))
    assert slots[:, :5].view(np.int8).tolist() == [[127, 0, 2, -2, -127], [0] * 5]
    assert slots[:, 5:].copy().view(np.float32)[:, 0].tolist() == [1, 0]
    assert reference.int8_values(slots).tolist() == [[127, 0, 2, -2, -127], [0] * 5]


def test_filters_by_hand() -> None:
    z = np.log(np.array([0.1, 0.4, 0.1, 0.3, 0.1], np.float32))

    def kept(**params: float) -> list[int]:
        return np.flatnonzero(reference.allowed(z, Sampling(**params))).tolist()  # type: ignore[arg-type]

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=3) == [0, 1, 3]  # of the three equal ones the lowest id
    assert kept(top_p=0.3) == [1]
    assert kept(top_p=0.5) == [1, 3]
    assert kept(top_p=0.75) == [0, 1, 3]
    assert kept(top_p=0.0) == [1]  # never none
    assert kept(min_p=0.5) == [1, 3]
    assert kept(top_k=3, top_p=0.7) == [1, 3]  # top_p of what top_k left: 0.4 + 0.3 of 0.8
    assert kept(top_p=0.75, min_p=0.5) == [1, 3]


def test_penalties_by_hand() -> None:
    logits = np.array([2.0, -2.0, 1.0, 1.0], np.float32)
    params = Sampling(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, bias={3: 4.0, 9: 1.0})
    got = reference.penalized(logits, params, [1, 0, 0, 2], prompt_length=1)
    np.testing.assert_array_equal(got, np.array([1.0 - 0.5 - 0.5, -4.0, 0.5 - 0.5 - 0.25, 5.0], np.float32))
    suppressed = Sampling(suppressed=[0, 9], min_tokens=4)
    assert reference.penalized(logits, suppressed, [1, 0, 0, 2], 1)[0] == -np.inf
    assert reference.penalized(logits, suppressed, [1, 0, 0, 2, 2], 1)[0] == 2.0


def test_draws_follow_the_softmax() -> None:
    logits = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    draws = 4000
    counts = np.zeros(4)
    for position in range(draws):
        noise = reference.gumbel(11, position, 0, np.arange(4))
        counts[np.argmax(logits / np.float32(0.7) + noise)] += 1
    weights = np.exp(logits / 0.7)
    expected = draws * weights / weights.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # chi squared, 3 degrees of freedom: p = 0.001
