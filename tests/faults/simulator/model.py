"""What every request must come to: tokens, and the K/V of every position, as pure functions of its prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvmanager.layout import U32
from kvmanager.prefix import Hash, page_hash, root_hash

PAGE_SIZE = 4
VOCABULARY = 3

# Stands for the K/V of a position: it depends on all tokens up to there, and on nothing else.
Vector = int


def next_vector(before: Vector, token: int) -> Vector:
    return hash((before, token))


def next_token(vector: Vector) -> int:
    """Greedy sampling from the last position."""
    return vector % VOCABULARY


@dataclass(frozen=True, slots=True)
class Truth:
    """One request's undisturbed life."""

    key: str
    root: Hash
    prompt: U32
    tokens: list[int]  # prompt and answer
    vectors: list[Vector]  # one for each token
    pages: dict[Hash, tuple[Vector, ...]]  # the hash of every page it can seal, and its K/V

    @classmethod
    def of(cls, key: str, salt: str, prompt: list[int], max_tokens: int) -> Truth:
        root = root_hash("model", "tenant", salt)
        tokens = list(prompt)
        vectors: list[Vector] = []
        vector = 0
        for position in range(len(prompt) + max_tokens):
            if position == len(tokens):
                tokens.append(next_token(vector))
            vector = next_vector(vector, tokens[position])
            vectors.append(vector)
        pages: dict[Hash, tuple[Vector, ...]] = {}
        parent = root
        for start in range(0, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
            parent = page_hash(parent, np.array(tokens[start : start + PAGE_SIZE], np.uint32))
            pages[parent] = tuple(vectors[start : start + PAGE_SIZE])
        return cls(key, root, np.array(prompt, np.uint32), tokens, vectors, pages)
