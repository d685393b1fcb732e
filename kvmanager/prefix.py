"""Content hashes of pages, chained: equal hashes mean equal tokens, history, salt, tenant and model."""

from __future__ import annotations

import hashlib
from bisect import insort
from typing import Final

import numpy as np

from kvmanager.layout import U32, U64

Hash = bytes
HASH_BYTES: Final = 16


def root_hash(fingerprint: str, tenant: str, salt: str) -> Hash:
    """The parent of a first page. Requests that differ here never meet.

    Each part's length is hashed too, so that no two triples run together to the same bytes.
    """
    root = hashlib.blake2b(digest_size=HASH_BYTES)
    for part in (fingerprint, tenant, salt):
        raw = part.encode()
        root.update(len(raw).to_bytes(8, "little"))
        root.update(raw)
    return root.digest()


def page_hash(parent: Hash, tokens: U32) -> Hash:
    """tokens: u32 [page_size]."""
    return hashlib.blake2b(parent + tokens.tobytes(), digest_size=HASH_BYTES).digest()


def to_words(value: Hash) -> U64:
    """u64 [2]."""
    return np.frombuffer(value, np.uint64)


def from_words(words: U64) -> Hash:
    """words: u64 [2]."""
    return words.tobytes()


class PrefixIndex:
    """Sealed pages by what they hold, and by what they begin with.

    hash -> its lowest sealed page; further pages with the same contents wait behind it: two requests
    that compute the same prefix at the same time make such twins.
    (parent's hash, first token) -> the pages that go on so: where a partial hit is looked for.
    """

    def __init__(self) -> None:
        self._lowest: dict[Hash, int] = {}
        self._others: dict[Hash, list[int]] = {}  # ascending
        self._children: dict[tuple[Hash, int], list[int]] = {}  # ascending

    def get(self, content: Hash) -> int | None:
        return self._lowest.get(content)

    def children(self, parent: Hash, first_token: int) -> list[int]:
        """Pages that follow `parent` and begin with this token, ascending."""
        return self._children.get((parent, first_token), [])

    def add(self, content: Hash, parent: Hash, first_token: int, page: int) -> None:
        insort(self._children.setdefault((parent, first_token), []), page)
        lowest = self._lowest.setdefault(content, page)
        if lowest == page:
            return
        self._lowest[content] = min(lowest, page)
        insort(self._others.setdefault(content, []), max(lowest, page))

    def remove(self, content: Hash, parent: Hash, first_token: int, page: int) -> None:
        """The page is about to hold something else."""
        children = self._children[parent, first_token]
        children.remove(page)
        if not children:
            del self._children[parent, first_token]
        others = self._others.get(content, [])
        if self._lowest[content] != page:
            others.remove(page)
        elif others:
            self._lowest[content] = others.pop(0)
        else:
            del self._lowest[content]
        if not others:
            self._others.pop(content, None)

    def snapshot(self) -> dict[Hash, tuple[int, ...]]:
        """All pages of each hash, ascending."""
        return {content: (page, *self._others.get(content, ())) for content, page in self._lowest.items()}

    def pages_of(self, content: Hash) -> tuple[int, ...]:
        """All pages that hold this, ascending."""
        lowest = self._lowest.get(content)
        return () if lowest is None else (lowest, *self._others.get(content, ()))

    def counts(self) -> tuple[int, int]:
        """How many pages are found by what they hold, and by what they begin with."""
        by_content = len(self._lowest) + sum(map(len, self._others.values()))
        return by_content, sum(map(len, self._children.values()))

    def children_snapshot(self) -> dict[tuple[Hash, int], tuple[int, ...]]:
        return {key: tuple(pages) for key, pages in self._children.items()}
