"""Pages: who holds each, which are free, which are cached, and in what order they are given up.

    page word      in rows   is called
    FREE, FILLING  0         free: may be handed out at once
    FILLING        1         being filled by its row
    SEALED         >= 1      shared, or about to be
    SEALED         0         cached: found by its hash until it is handed out again

Counts, the free list and the index are derived from page words, hashes and rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvmanager.layout import NO_PAGE, PageState, Tables, generation_of, page_word, state_of
from kvmanager.memory import Memory
from kvmanager.prefix import Hash, from_words, to_words

_EVICT_AT_ONCE = 64  # how many candidates are sorted out in one look over the page words


class Pages:
    """The pool's pages, as the manager thinks of them."""

    def __init__(
        self, tables: Tables, memory: Memory, hit: Callable[[str], None], back: Callable[[int], bool]
    ) -> None:
        self._tables = tables
        self._back = back
        self._memory = memory
        self._hit = hit
        self.count = len(tables.page_word)
        self.limit = self.count  # pages from here on cannot be backed by memory
        self.holders = np.zeros(self.count, np.int32)  # rows that name the page
        self.free: list[int] = []
        self.index: dict[Hash, int] = {}  # the lowest sealed page of each hash
        self._evictable: list[int] = []  # candidates, the best at the end; checked again when taken
        self.turn = 0

    def rebuild(self, held: np.ndarray) -> None:
        """Everything from the tables. held: [n] page ids, once for each row entry that names one."""
        tables = self._tables
        self.holders = np.bincount(held, minlength=self.count).astype(np.int32)
        self.holders[NO_PAGE] = 0
        states = tables.page_word & np.uint64(0xFF)
        loose = (self.holders == 0) & (states != PageState.SEALED)
        loose[NO_PAGE] = False
        loose[self.limit :] = False
        self.free = np.flatnonzero(loose)[::-1].tolist()
        self.index = {}
        for page in np.flatnonzero(states == PageState.SEALED).tolist():
            self.index.setdefault(from_words(tables.page_hash[page]), page)
        self._evictable = []
        self.turn = int(tables.page_used.max(initial=0)) >> 20

    @property
    def available(self) -> int:
        """What could be handed out: free and cached."""
        return self.limit - 1 - int(np.count_nonzero(self.holders))

    def reserve(self, wanted: int) -> bool:
        """Whether `wanted` pages can be taken now, with memory behind each. Changes no page."""
        if wanted > self.available:
            return False
        highest = max(self.free[-wanted:], default=0) if wanted else 0
        if self._back(highest):
            return True
        self.limit = min(highest, self.limit)  # the pool is smaller than it was meant to be
        self.free = [page for page in self.free if page < self.limit]
        return False

    def state(self, page: int) -> PageState:
        return PageState(state_of(int(self._tables.page_word[page])))

    def generation(self, page: int) -> int:
        return generation_of(int(self._tables.page_word[page]))

    def take(self) -> int:
        """A page for one row to fill: invalidated here, before any row names it. It was reserved."""
        page = self.free.pop() if self.free else self._evict()
        word = page_word(PageState.FILLING, self.generation(page) + 1)
        self._memory.put(self._tables.page_word, page, word)
        self._hit("kvmanager.ensure.page_taken")
        self.holders[page] += 1
        return page

    def hold(self, page: int) -> None:
        """One more row names a sealed page."""
        self.holders[page] += 1

    def release(self, page: int) -> None:
        """A row that named the page is gone."""
        self.holders[page] -= 1
        if self.holders[page] == 0 and self.state(page) is not PageState.SEALED:
            self.free.append(page)

    def seal(self, page: int, content: Hash, parent: Hash, tokens: np.ndarray) -> None:
        """Immutable from here on. tokens: u32 [page_size]."""
        tables, put = self._tables, self._memory.put
        put(tables.page_hash, page, to_words(content))
        put(tables.page_parent, page, to_words(parent))
        put(tables.page_tokens, page, tokens)
        self._hit("kvmanager.seal.before_word")
        put(tables.page_word, page, page_word(PageState.SEALED, self.generation(page)))
        known = self.index.get(content)
        if known is None or page < known:
            self.index[content] = page

    def touch(self, row_pages: list[int]) -> None:
        """Stamps a chain: later turns are newer, and within a turn the tail goes first."""
        self.turn += 1
        for depth, page in enumerate(row_pages):
            self._memory.put(self._tables.page_used, page, self.turn << 20 | (0xFFFFF - min(depth, 0xFFFFF)))

    def _evict(self) -> int:
        """The least recently used cached page, out of the index. Its word still says sealed."""
        tables = self._tables
        while True:
            if not self._evictable:
                sealed = tables.page_word & np.uint64(0xFF) == PageState.SEALED
                cached = np.flatnonzero(sealed & (self.holders == 0))
                order = np.argsort(tables.page_used[cached], kind="stable")[:_EVICT_AT_ONCE]
                self._evictable = cached[order][::-1].tolist()
            page = self._evictable.pop()
            if self.holders[page] == 0 and self.state(page) is PageState.SEALED:
                break
        content = from_words(tables.page_hash[page])
        if self.index.get(content) == page:
            del self.index[content]
            same = (tables.page_hash == tables.page_hash[page]).all(axis=1)
            same &= tables.page_word & np.uint64(0xFF) == PageState.SEALED
            same[page] = False
            others = np.flatnonzero(same)
            if len(others):
                self.index[content] = int(others[0])
        return page
