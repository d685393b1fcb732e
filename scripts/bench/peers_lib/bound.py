"""How fast a batch could be at most by the two rates of the machine, both measured in the same run.

    bound = sum over phases of max(FLOP / GEMM rate, bytes / read rate)

The phases of a batch of requests with prompts of p_i tokens and m new ones each: its prompts are one phase, which ends
with the first new token, and each of the m - 1 steps that follow is one. With W numbers in the matrices of all layers,
H in the output head, L layers, A = heads * head_dim, and K bytes of K/V a token:

    prompts  FLOP   sum over i of 2 W p_i + 2 H + 4 L A p_i (p_i + 1) / 2
             bytes  2 (W + H) + K sum over i of p_i
    step t   FLOP   sum over i of 2 (W + H) + 4 L A (p_i + t)
             bytes  2 (W + H) + K sum over i of (p_i + t)

Two bytes a number; embeddings, norms and the logits are left out. Weights count as read once a phase, K/V as written
once and read once a step. It is a yardstick, and more than all of it is no contradiction: weights of fewer bits are
fewer bytes, a guess that is right makes one step of several, a step with prompts and decodes hides the one's bytes
behind the other's arithmetic, and caches hold what counts as read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_BYTES: Final = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a decoder with gated MLPs."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def layer_numbers(self) -> int:
        """In the matrices of all layers."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_numbers(self) -> int:
        return self.hidden * self.vocab

    @property
    def weight_bytes(self) -> int:
        return _BYTES * (self.layer_numbers + self.head_numbers)

    @property
    def kv_bytes(self) -> int:
        """Of one token."""
        return _BYTES * 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def attention_flop(self) -> int:
        """Of one query over one key."""
        return 4 * self.layers * self.heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Rates:
    """The machine's, a second."""

    flop: float
    bytes: float

    def seconds(self, flop: float, nbytes: float) -> float:
        return max(flop / self.flop, nbytes / self.bytes)


@dataclass(frozen=True, slots=True)
class Bound:
    """Of one batch. Seconds."""

    prompts: float
    steps: float
    step: float  # the median step
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / (self.prompts + self.steps)


def bound(shape: Shape, prompts: Sequence[int], new_tokens: int, rates: Rates) -> Bound:
    """prompts: tokens of each. Raises ValueError when there is nothing to do."""
    if not prompts or new_tokens < 1:
        raise ValueError("a bound needs one prompt or more, and one new token or more")
    steps = [_step(shape, len(prompts), sum(prompts) + len(prompts) * t, rates) for t in range(1, new_tokens)]
    return Bound(
        prompts=_prompts(shape, prompts, rates),
        steps=sum(steps),
        step=sorted(steps)[len(steps) // 2] if steps else 0.0,
        tokens=len(prompts) * new_tokens,
    )


def _prompts(shape: Shape, prompts: Sequence[int], rates: Rates) -> float:
    pairs = sum(length * (length + 1) // 2 for length in prompts)
    products = 2 * (shape.layer_numbers * sum(prompts) + shape.head_numbers * len(prompts))
    flop = products + shape.attention_flop * pairs
    return rates.seconds(flop, shape.weight_bytes + shape.kv_bytes * sum(prompts))


def _step(shape: Shape, sequences: int, context: int, rates: Rates) -> float:
    """context: tokens that all sequences have together."""
    flop = 2 * (shape.layer_numbers + shape.head_numbers) * sequences + shape.attention_flop * context
    return rates.seconds(flop, shape.weight_bytes + shape.kv_bytes * context)
