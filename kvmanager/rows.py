"""Rows: the block tables of live sequences, found by (key, output index) or by number; and of pinned prefixes.

    FREE ──make: key, entries, length, then the word──▶ LIVE or PINNED ──release: the word──▶ FREE

A live row grows by entries first, its length last. Row generations count over all rows, so that
an older row of the same output is older by its generation, wherever it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvmanager.keys import key_words, words_key
from kvmanager.layout import LOW32, MOST_PINS, RowState, Tables, generation_of, index_of, row_word, state_of
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

    def __init__(self, tables: Tables, memory: Memory, hit: Callable[[str], None]) -> None:
        self._tables = tables
        self._memory = memory
        self._hit = hit
        self.live: dict[tuple[str, int], Row] = {}
        self.pinned: dict[str, Row] = {}  # by the pin's key
        self.free: list[int] = []  # for sequences
        self.newest = 0  # the highest row generation so far
        self._numbered: dict[int, Row] = {}  # the live ones

    def rebuild(self) -> None:
        """Everything from the tables, except `sealed`."""
        tables = self._tables
        words = tables.row_word.tolist()
        self.live, self.pinned, self._numbered = {}, {}, {}
        self.free = [number for number in range(tables.rows) if state_of(words[number]) == RowState.FREE][::-1]
        self.newest = max(map(generation_of, words), default=0)
        for number, word in enumerate(words):
            state = state_of(word)
            if state == RowState.FREE:
                continue
            key, length = words_key(tables.row_key[number]), int(tables.row_length[number])
            self._enter(Row(number, key, index_of(word), generation_of(word), length), RowState(state))

    def _enter(self, row: Row, state: RowState) -> None:
        if state is RowState.PINNED:
            self.pinned[row.key] = row
        else:
            self.live[row.key, row.index] = row
            self._numbered[row.number] = row

    def free_pin(self) -> int | None:
        """A place for one more pinned prefix; None: all are taken."""
        taken = {row.index for row in self.pinned.values()}
        return next((place for place in range(MOST_PINS) if place not in taken), None)

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
        self.newest += 1
        row = Row(self.free.pop(), key, index, self.newest, len(pages), sealed)
        self._write(row, RowState.LIVE, pages, generations)
        return row

    def pin(self, key: str, place: int, pages: Ids, generations: np.ndarray) -> Row:
        """A pinned row over sealed `pages`; its name is written already. place: a free one."""
        self.newest += 1
        row = Row(self._tables.rows + place, key, place, self.newest, len(pages), len(pages))
        self._write(row, RowState.PINNED, pages, generations)
        return row

    def _write(self, row: Row, state: RowState, pages: Ids, generations: np.ndarray) -> None:
        tables, put = self._tables, self._memory.put
        put(tables.row_key, row.number, key_words(row.key))
        put(tables.row_entry, (row.number, slice(0, len(pages))), pages.astype(np.uint64) | generations << _SHIFT)
        put(tables.row_length, row.number, len(pages))
        self._hit("kvmanager.row.before_word")
        put(tables.row_word, row.number, row_word(state, row.index, row.generation))
        self._enter(row, state)

    def extend(self, numbers: Ids, counts: Ids, pages: Ids, generations: np.ndarray) -> list[Row]:
        """Adds entries at the end of live rows; they count from the store of the length. Returns the rows.

        numbers, counts: i64 [n], no number twice; pages: i64 [sum of counts], in the order of the rows.
        """
        tables, put = self._tables, self._memory.put
        lengths = tables.row_length[numbers].astype(np.int64)
        within = np.arange(len(pages)) - np.repeat(np.cumsum(counts) - counts, counts)
        places = np.repeat(lengths, counts) + within
        put(tables.row_entry, (np.repeat(numbers, counts), places), pages.astype(np.uint64) | generations << _SHIFT)
        lengths += counts
        self._hit("kvmanager.row.before_length")
        put(tables.row_length, numbers, lengths.astype(np.uint64))
        extended = [self._numbered[number] for number in numbers.tolist()]
        for row, length in zip(extended, lengths.tolist(), strict=True):
            row.length = length
        return extended

    def shrink(self, row: Row, length: int) -> None:
        self._memory.put(self._tables.row_length, row.number, length)
        row.length = length

    def release(self, row: Row) -> None:
        """A live row, or a pinned one."""
        self._memory.put(self._tables.row_word, row.number, row_word(RowState.FREE, 0, row.generation))
        self._hit("kvmanager.row.released")
        if row.number < self._tables.rows:
            del self.live[row.key, row.index], self._numbered[row.number]
            self.free.append(row.number)
        else:
            del self.pinned[row.key]
