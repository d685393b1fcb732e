"""A pool whose memory is lost, made empty: no token is lost by it, for tokens are in the logs.

    rows free ──▶ pages free, each of the next generation ──▶ another pool uuid, the next pool generation

In this order a death between any two stores leaves tables that are sound, and whose next owner repeats it.
Whoever still maps the lost memory sees the uuid change, and knows that nothing it computed is there any more.
"""

from __future__ import annotations

import secrets

import numpy as np

from kvmanager.layout import LOW32, NO_PAGE, U64, Header, RowState, Tables
from kvmanager.memory import Memory

_SHIFT = np.uint64(32)


def renew(tables: Tables, memory: Memory | None = None) -> None:
    """No executor has the memory mapped as this pool's, or it learns of this before its next attach."""
    put = (memory or Memory()).put
    header, words = tables.header, tables.row_word
    put(header, Header.POOL_BYTES, 0)
    used = np.flatnonzero(words & np.uint64(0xFF) != RowState.FREE)
    # A row's generation stays: the next one that is made is newer than all.
    put(words, used, words[used] >> _SHIFT << _SHIFT)
    pages = np.arange(NO_PAGE + 1, len(tables.page_word))
    put(tables.page_word, pages, _next_generation(tables.page_word[pages]))
    name(header, memory)


def name(header: U64, memory: Memory | None = None) -> None:
    """Another memory is another pool: a uuid that was never there, and the next generation."""
    put = (memory or Memory()).put
    uuid = np.frombuffer(secrets.token_bytes(16), np.uint64)
    put(header, slice(Header.POOL_UUID, Header.POOL_UUID + 2), uuid)
    put(header, Header.POOL_GENERATION, int(header[Header.POOL_GENERATION]) + 1)


def _next_generation(words: U64) -> U64:
    """Free, and one generation on. words: u64 [n]."""
    return ((words >> _SHIFT) + np.uint64(1) & np.uint64(LOW32)) << _SHIFT
