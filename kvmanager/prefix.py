"""Content hashes of pages, chained: equal hashes mean equal tokens, history, salt and model."""

from __future__ import annotations

import hashlib

import numpy as np

from kvmanager.layout import U32, U64

Hash = bytes  # 16 bytes


def root_hash(fingerprint: str, tenant: str, salt: str) -> Hash:
    """The parent of a first page. Requests with different salts never meet."""
    parts = "\0".join((fingerprint, tenant, salt)).encode()
    return hashlib.blake2b(parts, digest_size=16).digest()


def page_hash(parent: Hash, tokens: U32) -> Hash:
    return hashlib.blake2b(parent + tokens.astype("<u4").tobytes(), digest_size=16).digest()


def chain(root: Hash, tokens: U32, page_size: int) -> list[Hash]:
    """The hash of every whole page of `tokens`, in order."""
    hashes: list[Hash] = []
    parent = root
    for start in range(0, len(tokens) - page_size + 1, page_size):
        parent = page_hash(parent, tokens[start : start + page_size])
        hashes.append(parent)
    return hashes


def to_words(value: Hash) -> tuple[int, int]:
    return int.from_bytes(value[:8], "little"), int.from_bytes(value[8:], "little")


def from_words(words: U64) -> Hash:
    return np.asarray(words, "<u8").tobytes()
