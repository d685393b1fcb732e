"""Rows: the block tables of live sequences, found by (key, output index).

    FREE ──make: key, entries, length, then the word──▶ LIVE ──free: the word──▶ FREE

A live row grows by entries first, its length last. Row generations count over all rows, so that
an older row of the same output is older by its number, wherever it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvmanager.layout import (
    LOW32,
    RowState,
    Tables,
    generation_of,
    index_of,
    key_words,
    row_word,
    state_of,
    words_key,
)
from kvmanager.memory import Memory
from kvmanager.pages import Ids

_SHIFT: Final = np.uint64(32)


@dataclass(slots=True)
class Row:
    """What the tables say of one live row, decoded."""

    number: int
    key: str
    index: int
    generation: int
    length: int  # entries in use
    sealed: int = 0  # leading entries that are sealed


class Rows:
    """All rows of the tables."""

    def __init__(self, tables: Tables, memory: Memory) -> None:
        self._tables = tables
        self._memory = memory
        self.live: dict[tuple[str, int], Row] = {}
        self.free: list[int] = []
        self.newest = 0  # the highest row generation so far

    def rebuild(self) -> None:
        """Everything from the tables, except `sealed`."""
        tables = self._tables
        words = tables.row_word.tolist()
        self.live = {}
        self.free = [number for number, word in enumerate(words) if state_of(word) != RowState.LIVE][::-1]
        self.newest = max(map(generation_of, words), default=0)
        for number, word in enumerate(words):
            if state_of(word) == RowState.LIVE:
                key, index = words_key(tables.row_key[number]), index_of(word)
                length = int(tables.row_length[number])
                self.live[key, index] = Row(number, key, index, generation_of(word), length)

    @property
    def capacity(self) -> int:
        """Entries of a row."""
        return int(self._tables.row_entry.shape[1])

    def pages(self, row: Row, start: int = 0) -> Ids:
        """i64 [length - start]: the pages of entries `start` and up."""
        entries = self._tables.row_entry[row.number, start : row.length]
        return (entries & np.uint64(LOW32)).astype(np.int64)

    def make(self, key: str, index: int, pages: Ids, generations: np.ndarray, sealed: int) -> Row:
        """A live row over `pages`, i64 [n], of these generations, u64 [n]. There must be a free row."""
        tables, put = self._tables, self._memory.put
        number = self.free.pop()
        self.newest += 1
        row = Row(number, key, index, self.newest, len(pages), sealed)
        put(tables.row_key, number, key_words(key))
        put(tables.row_entry, (number, slice(0, len(pages))), pages.astype(np.uint64) | generations << _SHIFT)
        put(tables.row_length, number, len(pages))
        put(tables.row_word, number, row_word(RowState.LIVE, index, row.generation))
        self.live[key, index] = row
        return row

    def append(self, row: Row, pages: Ids, generations: np.ndarray) -> None:
        """Adds entries at the end; they count from the store of the length."""
        end = row.length + len(pages)
        entries = pages.astype(np.uint64) | generations << _SHIFT
        self._memory.put(self._tables.row_entry, (row.number, slice(row.length, end)), entries)
        self._memory.put(self._tables.row_length, row.number, end)
        row.length = end

    def shrink(self, row: Row, length: int) -> None:
        self._memory.put(self._tables.row_length, row.number, length)
        row.length = length

    def release(self, row: Row) -> None:
        self._memory.put(self._tables.row_word, row.number, row_word(RowState.FREE, 0, row.generation))
        del self.live[row.key, row.index]
        self.free.append(row.number)
