"""What the kernels compute, in plain NumPy: slow, float64, any shape. Every device is tested against this file.

Attention is exact up to float64. Sampling is exact to the token: it rounds to float32 where the definition
does (each operation on logits, the noise), and is float64 elsewhere (exponentials, sums).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

LOW32: Final = np.uint64(0xFFFFFFFF)


# --- int8 pages ---


def int8_slots(values: F32) -> U8:
    """What slots of int8 pages hold of values [..., head_dim]: uint8 [..., head_dim + 4], the codes, then their scale.

    value = code * scale; the scale, a float32, is the largest |value| / 127, or 0 where that is below 1e-30.
    """
    largest = np.abs(values).max(axis=-1, keepdims=True)
    scales = np.where(largest < np.float32(1e-30), np.float32(0), largest / np.float32(127))
    codes = np.rint(values / np.where(scales == 0, np.float32(1), scales)).astype(np.int8)  # rint: half to even
    return np.concatenate((codes.view(np.uint8), scales.view(np.uint8)), axis=-1)


def int8_values(slots: U8) -> F64:
    """The inverse, exact: [..., head_dim]."""
    scales = np.ascontiguousarray(slots[..., -4:]).view(np.float32).astype(np.float64)
    values: F64 = slots[..., :-4].view(np.int8) * scales
    return values


# --- attention ---


def gather(pool: npt.NDArray[Any], row: U64, layer: int, positions: npt.NDArray[np.int64]) -> tuple[F64, F64]:
    """Keys and values [positions, kv_heads, head_dim] of one sequence.

    pool: [pages, layers, 2 (k, v), kv_heads, page_size, head_dim]. row: block table [entries], page id in
    the low 32 bits of an entry.
    """
    page_size = pool.shape[4]
    pages = (row & LOW32).astype(np.int64)[positions // page_size]
    both = pool[pages, layer, :, :, positions % page_size].astype(np.float64)
    return both[:, 0], both[:, 1]


def paged_attention(
    queries: npt.NDArray[Any], pool: npt.NDArray[Any], row: U64, layer: int, start: int, window: int, softcap: float
) -> F64:
    """Softmax attention of the positions [start, start + count), whose K and V are in the pages.

    queries: [count, heads, head_dim], rotated, not scaled; heads a multiple of the pool's kv_heads, and query
    head h reads kv head h // (heads / kv_heads). Causal from the right: the query at position p sees (p - window, p],
    or [0, p] when window is 0. softcap c: scores s become c tanh(s / c); 0: none.
    Reads no slot that no query sees. Returns float64 [count, heads, head_dim].
    """
    count, heads, head_dim = queries.shape
    first = max(0, start + 1 - window) if window else 0
    seen = np.arange(first, start + count)
    group = heads // pool.shape[3]
    keys, values = (np.repeat(half, group, axis=1) for half in gather(pool, row, layer, seen))
    scores = np.einsum("qhd,khd->hqk", queries.astype(np.float64), keys) / np.sqrt(head_dim)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    at = np.arange(start, start + count)[:, None]
    visible = (seen <= at) & ((seen > at - window) if window else True)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    output: F64 = np.einsum("hqk,khd->qhd", weights, values)
    return output


# --- noise ---


def philox4x32(counter: Sequence[npt.ArrayLike], key: Sequence[npt.ArrayLike], rounds: int = 10) -> tuple[U32, ...]:
    """Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    counter: four words, key: two words, low first; arrays broadcast. Returns four words.
    """
    c0, c1, c2, c3, k0, k1 = (np.asarray(word, np.uint64) for word in (*counter, *key))
    for _ in range(rounds):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> np.uint64(32)) ^ c1 ^ k0, b & LOW32, (a >> np.uint64(32)) ^ c3 ^ k1, a & LOW32
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & LOW32, (k1 + np.uint64(0xBB67AE85)) & LOW32
    return tuple(word.astype(np.uint32) for word in (c0, c1, c2, c3))


def gumbel(seed: int, position: int, index: int, tokens: npt.ArrayLike, stream: int = 0) -> F32:
    """Gumbel noise of each token, float32: -log(-log(u)) of a 24-bit uniform u that is never 0 or 1.

    position: that the token would take. index: of the output. stream: the use of the noise, 0 for sampling.
    """
    word = philox4x32((position, index, tokens, stream), (seed & 0xFFFFFFFF, seed >> 32))[0]
    uniform = ((word >> np.uint32(8)).astype(np.float64) + 0.5) * 2.0**-24
    noise: F32 = (-np.log(-np.log(uniform))).astype(np.float32)
    return noise


# --- sampling ---


@dataclass(frozen=True, slots=True)
class Sampling:
    """Parameters of one output; each default means off. Floats are taken as float32."""

    seed: int = 0
    temperature: float = 1.0  # 0: the best token, no noise
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0
    output_index: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)
    suppressed: Sequence[int] = ()  # while the output has fewer than min_tokens tokens
    min_tokens: int = 0


class Sampled(NamedTuple):
    token: int
    logprob: float  # of the token under the logits as given


def penalized(logits: F32, params: Sampling, tokens: Sequence[int], prompt_length: int) -> F32:
    """Logits [vocab] after penalties, then bias, then suppression. tokens: prompt and output so far.

    Ids outside the vocabulary are ignored.
    """
    z = logits.astype(np.float32).copy()
    vocab = len(z)
    if params.repetition_penalty != 1.0:
        penalty = np.float32(params.repetition_penalty)
        for v in {v for v in tokens if v < vocab}:
            z[v] = z[v] / penalty if z[v] > 0 else z[v] * penalty
    output = [v for v in tokens[prompt_length:] if v < vocab]
    for v in set(output):
        z[v] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * np.float32(output.count(v))
    for v, value in params.bias.items():
        if v < vocab:
            z[v] += np.float32(value)
    if len(tokens) - prompt_length < params.min_tokens:
        z[[v for v in params.suppressed if v < vocab]] = -np.inf
    return z


def allowed(z: F32, params: Sampling) -> Bools:
    """Which tokens may be drawn: top-k, then top-p of these, then min-p of these. Ties go to the lower id.

    z: logits [vocab] over the temperature. A token of -inf is never allowed.
    """
    order = np.lexsort((np.arange(len(z)), -z))  # best first, equal ones by id
    order = order[np.isfinite(z[order])]
    if not len(order):
        return np.zeros(len(z), np.bool_)
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp(z[order].astype(np.float64) - float(z[order[0]]))
    # A token stays while those before it hold less than top_p: the first always does.
    if params.top_p < 1:
        before = np.concatenate(([0.0], np.cumsum(weights)[:-1]))
        order = order[(before < float(np.float32(params.top_p)) * weights.sum()) | (before == 0)]
    # The best token always stays.
    order = order[(weights[: len(order)] >= float(np.float32(params.min_p))) | (np.arange(len(order)) == 0)]
    mask = np.zeros(len(z), np.bool_)
    mask[order] = True
    return mask


def sample(logits: F32, params: Sampling, tokens: Sequence[int], prompt_length: int) -> Sampled:
    """The token at position len(tokens): argmax over the allowed v of z(v) + Gumbel(v), a tie to the lower id.

    logits: [vocab], of the last position of `tokens`.
    """
    z = penalized(logits, params, tokens, prompt_length)
    if params.temperature:
        z = z / np.float32(params.temperature)
        noise = gumbel(params.seed, len(tokens), params.output_index, np.arange(len(z)))
        z = np.where(allowed(z, params), z + noise, np.float32(-np.inf))
    token = int(np.argmax(z))
    exact = logits.astype(np.float64)
    return Sampled(token, float(exact[token] - exact.max() - np.log(np.sum(np.exp(exact - exact.max())))))
