"""What every request must come to: tokens, and the K/V of every position, as pure functions of its prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmanager.layout import U32
from kvmanager.prefix import Hash, page_hash

# Stands for the K/V of a position: it depends on the salt and on all tokens up to there, and on nothing else.
Vector = int


def first_vector(root: Hash) -> Vector:
    """Stands before the first position: what belongs to another salt is another K/V."""
    return int.from_bytes(root[:7], "little")


def next_vector(before: Vector, token: int) -> Vector:
    return hash((before, token))


def next_token(vector: Vector, index: int, seed: int, shape: Shape) -> int:
    """Sampling from the last position: output and seed are part of the noise."""
    return shape.first_token + hash((vector, index, seed)) % (shape.vocabulary - shape.first_token)


@dataclass(frozen=True, slots=True)
class OutputTruth:
    """One output's undisturbed life."""

    key: str
    index: int
    tokens: list[int]  # prompt and answer
    vectors: list[Vector]  # one for each token
    kv: npt.NDArray[np.int64]  # the same

    @property
    def name(self) -> str:
        return f"output {self.index} of {self.key}"


@dataclass(frozen=True, slots=True)
class Shape:
    """What all requests of a schedule share."""

    page_size: int  # tokens
    vocabulary: int  # tokens are below it
    first_token: int = 0  # and not below this


@dataclass(frozen=True, slots=True)
class Truth:
    """One request's undisturbed life."""

    key: str
    root: Hash
    prompt: U32
    outputs: list[OutputTruth]
    pages: dict[Hash, tuple[Vector, ...]]  # the hash of every page that it can seal, and its K/V

    @classmethod
    def of(
        cls,
        key: str,
        root: Hash,
        prompt: list[int],
        max_tokens: int,
        outputs: int,
        shape: Shape,
        first: Vector = 0,
        stops: frozenset[int] = frozenset(),
        seed: int = 0,
    ) -> Truth:
        """first: stands before the first position. stops: tokens that end an output."""
        made: list[OutputTruth] = []
        pages: dict[Hash, tuple[Vector, ...]] = {}
        for index in range(outputs):
            tokens = list(prompt)
            vectors, vector = list[Vector](), first
            for position in range(len(prompt) + max_tokens):
                if position == len(tokens):
                    if position > len(prompt) and tokens[-1] in stops:
                        break
                    tokens.append(next_token(vector, index, seed, shape))
                vector = next_vector(vector, tokens[position])
                vectors.append(vector)
            made.append(OutputTruth(key, index, tokens, vectors, np.array(vectors, np.int64)))
            pages |= _pages(root, tokens, vectors, shape.page_size)
        return cls(key, root, np.array(prompt, np.uint32), made, pages)

    def chain(self, pages: int, size: int) -> Hash:
        """The hash of the prompt's page number `pages` - 1: of all up to there."""
        parent = self.root
        for number in range(pages):
            parent = page_hash(parent, self.prompt[number * size : (number + 1) * size])
        return parent


def _pages(root: Hash, tokens: list[int], vectors: list[Vector], size: int) -> dict[Hash, tuple[Vector, ...]]:
    pages: dict[Hash, tuple[Vector, ...]] = {}
    words, parent = np.array(tokens, np.uint32), root
    for start in range(0, len(tokens) - size + 1, size):
        parent = page_hash(parent, words[start : start + size])
        pages[parent] = tuple(vectors[start : start + size])
    return pages
