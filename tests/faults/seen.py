"""What the shared files say to somebody who only reads them, whoever wrote them last."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from kvmanager.keys import words_key
from kvmanager.layout import HEADER_WORDS, Header, RowState, Tables, generation_of, index_of, state_of
from pagehold.runtime.statedir import StateDir

Name = tuple[str, int]  # a request's key and an output's index


@dataclass(frozen=True, slots=True)
class RowSeen:
    """A live row. entries: the words, with page ids and page generations."""

    row: int
    generation: int
    entries: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """All that is primary, but for the pages' words."""

    epoch: int
    rows: dict[Name, RowSeen]
    records: frozenset[str]  # keys


def look(state: StateDir, tables: Tables) -> Seen:
    """The files as they are now. Raises AssertionError when an output has two rows."""
    rows: dict[Name, RowSeen] = {}
    for number, word in enumerate(tables.row_word[: tables.rows].tolist()):
        if state_of(word) == RowState.LIVE:
            name = (words_key(tables.row_key[number]), index_of(word))
            assert name not in rows, f"two rows of {name}"
            entries = tables.row_entry[number, : int(tables.row_length[number])].tolist()
            rows[name] = RowSeen(number, generation_of(word), tuple(entries))
    return Seen(int(tables.header[Header.EPOCH]), rows, frozenset(path.stem for path in state.records.glob("*.req")))


def map_tables(state: StateDir) -> Tables:
    """As an executor maps them: read-only."""
    with state.tables.open("rb") as file:
        buffer = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    header = np.frombuffer(buffer, np.uint64, HEADER_WORDS)
    names = (Header.PAGES, Header.ROWS, Header.ROW_ENTRIES, Header.PAGE_SIZE)
    return Tables(buffer, *(int(header[name]) for name in names))
