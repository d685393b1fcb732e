"""Pinned prefixes: rows without a sequence, whose sealed pages stay until an operator unpins them.

A request reserves its prompt's whole pages under a name. The manager makes the row by itself as soon
as those pages are sealed, at the latest when the sequence's row closes, so that no death between
the two can lose it. Under a name that is taken the new prefix replaces the old one. What is unpinned
while its request is open is pinned again when the request's row closes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvmanager.keys import pin_key, pin_words, words_pin
from kvmanager.layout import Tables
from kvmanager.memory import Memory
from kvmanager.pages import Ids, Pages
from kvmanager.rows import Row, Rows


@dataclass(frozen=True, slots=True)
class Pin:
    """Who reserves what: names are each tenant's own."""

    tenant: str
    name: str

    @property
    def key(self) -> str:
        return pin_key(self.tenant, self.name)


@dataclass(frozen=True, slots=True)
class Pinned:
    """One reserved prefix, for lists."""

    pin: Pin
    pages: int


class Pins:
    """The pinned rows. `pages` is derived: every page that one of them names."""

    def __init__(self, tables: Tables, memory: Memory, rows: Rows, pages: Pages) -> None:
        self._tables = tables
        self._memory = memory
        self._rows = rows
        self._pages = pages
        self.pages: frozenset[int] = frozenset()

    def rebuild(self) -> None:
        held = [self._rows.pages(row) for row in self._rows.pinned.values()]
        self.pages = frozenset(np.concatenate([np.zeros(0, np.int64), *held]).tolist())

    @property
    def most_pages(self) -> int:
        """The other half of the pool is for those who pin nothing."""
        return self._pages.usable // 2

    def list(self) -> list[Pinned]:
        """By name."""
        found = [
            Pinned(Pin(*words_pin(self._tables.pin_name[row.index])), row.length) for row in self._rows.pinned.values()
        ]
        return sorted(found, key=lambda pinned: (pinned.pin.tenant, pinned.pin.name))

    def set(self, pin: Pin, prefix: Ids) -> None:
        """The pin names these sealed pages, i64 [n >= 1], from now on. Without room for it nothing changes."""
        there = self._rows.pinned.get(pin.key)
        if there is not None and self._same(there, prefix):
            return
        if len(self.pages.union(prefix.tolist())) > self.most_pages:
            return
        if there is not None:
            self._release(there)
        place = self._rows.free_pin()
        if place is None:
            return
        self._pages.hold(prefix)
        self._memory.put(self._tables.pin_name, place, pin_words(pin.tenant, pin.name))
        self._rows.pin(pin.key, place, prefix, self._pages.generations(prefix))
        self.rebuild()

    def _same(self, row: Row, prefix: Ids) -> bool:
        """Hashes are chained: equal last pages mean equal prefixes."""
        last = self._tables.page_hash[self._rows.pages(row)[-1]]
        return row.length == len(prefix) and bool((last == self._tables.page_hash[prefix[-1]]).all())

    def remove(self, pin: Pin) -> bool:
        """Whether there was such a pin. Its pages stay cached until they are evicted."""
        row = self._rows.pinned.get(pin.key)
        if row is not None:
            self._release(row)
        return row is not None

    def _release(self, row: Row) -> None:
        pages = self._rows.pages(row)
        self._pages.touch(pages)
        self._rows.release(row)
        self._pages.release(pages)
        self.rebuild()
