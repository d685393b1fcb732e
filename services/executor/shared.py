"""The executor's view of the shared files: `tables` read-only, the pool read and written.

A pool on a device has no file: `DevicePool` opens its memory.
"""

from __future__ import annotations

import numpy as np

from kvmanager.geometry import read_geometry, read_shape
from kvmanager.keys import words_key
from kvmanager.layout import (
    F32,
    HEADER_WORDS,
    LOW32,
    NO_PAGE,
    U64,
    Geometry,
    Header,
    PageState,
    RowState,
    Tables,
    generation_of,
    index_of,
    page_of,
    state_of,
    usable_computed,
)
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.mapping import map_shared
from pagehold.runtime.statedir import StateDir
from services.executor.sequence import Request, Sequence


class SharedPool:
    """Mapped once, on the first attach; it stays valid across restarts of the manager."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._tables: Tables | None = None
        self.pages = 0
        self.page_size = 0

    @property
    def mapped(self) -> bool:
        return self._tables is not None

    @property
    def tables(self) -> Tables:
        assert self._tables is not None, "no pool before the first attach"
        return self._tables

    @property
    def epoch(self) -> int:
        return int(self.tables.header[Header.EPOCH]) if self._tables is not None else 0

    @property
    def geometry(self) -> Geometry:
        """With the strides of a page's elements."""
        return read_geometry(self.tables.header)

    @property
    def scales(self) -> F32:
        """Of fp8 pages, float32 [layers, K and V, kv_heads]: an element's value over what is stored. Else empty."""
        geometry = self.geometry
        return self.tables.scales.reshape(-1, 2, geometry.kv_heads)

    @property
    def pool_uuid(self) -> bytes:
        """Of the manager's pool as it is now. On a device another memory behind the same tables has another."""
        return _uuid(self.tables.header)

    def map(self) -> memoryview:
        """Maps both files; returns the pool's bytes."""
        self.map_tables()
        return map_shared(self._state.pool, writable=True)

    def map_tables(self) -> None:
        raw = map_shared(self._state.tables, writable=False)
        self._tables = Tables(raw, *read_shape(np.frombuffer(raw, np.uint64, HEADER_WORDS)))
        self.pages, self.page_size = self._tables.page_tokens.shape

    def still_the_same(self) -> bool:
        """Whether a manager that came back serves the tables that are mapped here."""
        with self._state.tables.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_WORDS * 8), np.uint64)
        return _uuid(header) == self.pool_uuid

    def bind(self, sequence: Sequence) -> None:
        """Points the sequence at its row."""
        sequence.lane.row = self.tables.row_entry[sequence.row]

    def unbind(self, sequence: Sequence) -> None:
        """It has no row any more; an answer about the one that it had counts for nothing."""
        sequence.row, sequence.row_generation, sequence.capacity = -1, 0, 0
        sequence.computed, sequence.ask_from, sequence.starved, sequence.asking = 0, 0, False, False
        sequence.lane.row = None

    def usable_computed(self, sequence: Sequence) -> int:
        """Never beyond what is known: a full prefix hit can seal no token that does not exist."""
        return min(usable_computed(self.tables, sequence.row, sequence.log.computed), sequence.known)

    def still_holds(self, copy: kv.PageCopy) -> bool:
        """Whether the page holds what it held when the manager said so."""
        word = int(self.tables.page_word[copy.page])
        return generation_of(word) == copy.page_generation and state_of(word) != PageState.FREE

    def page_at(self, sequence: Sequence, position: int) -> int:
        """The page of the sequence's row that holds this position."""
        return page_of(int(self.tables.row_entry[sequence.row, position // self.page_size]))

    def free_pages(self) -> int:
        """Pages that no row names, live or pinned: what a new request could get, cached ones included."""
        tables = self.tables
        there = tables.row_word & np.uint64(0xFF) != RowState.FREE
        used = np.arange(tables.row_entry.shape[1]) < tables.row_length[there, None]
        held = np.unique(tables.row_entry[there][used] & np.uint64(LOW32))
        return self.pages - 1 - len(held[held != NO_PAGE])

    def find_rows(self, requests: dict[str, Request]) -> list[Sequence]:
        """Gives every sequence that has a live row its row back; returns those."""
        found: list[Sequence] = []
        for row in np.flatnonzero(self.tables.row_word & np.uint64(0xFF) == RowState.LIVE).tolist():
            word = int(self.tables.row_word[row])
            request = requests.get(words_key(self.tables.row_key[row]))
            if request is None or state_of(word) != RowState.LIVE:
                continue
            sequence = request.sequences[index_of(word)]
            sequence.row, sequence.row_generation = row, generation_of(word)
            sequence.capacity = int(self.tables.row_length[row]) * self.page_size
            self.bind(sequence)
            sequence.computed = self.usable_computed(sequence)
            found.append(sequence)
        return found


def _uuid(header: U64) -> bytes:
    return header[Header.POOL_UUID : Header.POOL_UUID + 2].tobytes()
