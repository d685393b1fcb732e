"""Pages: who holds each, which are free, which are cached, and in what order they are given up.

    page word      in rows   is called
    FREE, FILLING  0         free: may be handed out at once
    FILLING        1         being filled by its row
    SEALED         >= 1      shared, or about to be
    SEALED         0         cached: found by its hash until it is handed out again

    free ──take: (FILLING, generation + 1)──▶ filling ──seal──▶ sealed ──release──▶ cached
      ▲                                          │                                     │
      └───────────────release───────────────────┘◀───────────────take──────────────────┘

Only page words, hashes and last uses are stored. Holders, the free list, the prefix index and
the order of eviction are derived from them and from the rows.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvmanager.layout import NO_PAGE, U32, PageState, Tables, generation_of, page_word, state_of
from kvmanager.memory import Memory
from kvmanager.prefix import Hash, PrefixIndex, from_words, to_words

Ids = npt.NDArray[np.int64]

# `page_used` is a turn number over the place in the chain, counted down: the tail of a chain is older than its head.
TURN_SHIFT: Final = 20
_DEEPEST: Final = (1 << TURN_SHIFT) - 1
_STATE: Final = np.uint64(0xFF)
_GENERATION_SHIFT: Final = np.uint64(32)


class Pages:
    """The pool's pages, as the manager thinks of them."""

    def __init__(
        self, tables: Tables, memory: Memory, hit: Callable[[str], None], back: Callable[[int], int], limit: int
    ) -> None:
        """back(page): tries to put memory behind pages 0..page; returns how many pages have memory.

        limit: pages from this id on are never used.
        """
        self._tables = tables
        self._memory = memory
        self._hit = hit
        self._back = back
        self.count = len(tables.page_word)
        self._most = limit
        self.limit = limit  # pages from this id on are not used: lower while no memory is to be had for them
        self.holders: npt.NDArray[np.int32] = np.zeros(self.count, np.int32)  # rows that name the page
        self.free: list[int] = []  # the next one at the end
        self.cached = 0
        self.index = PrefixIndex()
        self.turn = 0
        # (last use, page): every cached page has its entry; entries of others are stale and skipped.
        self._eviction: list[tuple[int, int]] = []

    def rebuild(self, held: Ids) -> None:
        """Everything from the tables. held: i64 [n] page ids, once for each row entry that names one."""
        self.holders = np.bincount(held, minlength=self.count).astype(np.int32)
        self.holders[NO_PAGE] = 0
        states = self._tables.page_word & _STATE
        loose = (self.holders == 0) & (states != PageState.SEALED)
        loose[NO_PAGE] = False
        loose[self.limit :] = False
        # Lowest ids first: pages that have no memory yet come last.
        self.free = np.flatnonzero(loose)[::-1].tolist()
        self.index = PrefixIndex()
        for page in np.flatnonzero(states == PageState.SEALED).tolist():
            self.index.add(*self._names(page), page)
        self.turn = int(self._tables.page_used.max(initial=0)) >> TURN_SHIFT
        self._rebuild_eviction()
        self.cached = len(self._eviction)

    def _names(self, page: int) -> tuple[Hash, Hash, int]:
        """What the index finds a sealed page by: its hash, its parent's and its first token."""
        tables = self._tables
        parent = from_words(tables.page_parent[page])
        return from_words(tables.page_hash[page]), parent, int(tables.page_tokens[page, 0])

    def _rebuild_eviction(self) -> None:
        states = self._tables.page_word & _STATE
        cached = np.flatnonzero((self.holders == 0) & (states == PageState.SEALED))
        self._eviction = sorted(zip(self._tables.page_used[cached].tolist(), cached.tolist(), strict=True))

    @property
    def usable(self) -> int:
        """All pages that rows can get, as things are."""
        return max(self.limit - 1, 0)

    @property
    def promised(self) -> int:
        """All that they can get once there is memory for each: what an open request may count on."""
        return max(self._most - 1, 0)

    @property
    def available(self) -> int:
        """What could be handed out now: free and cached."""
        return len(self.free) + self.cached

    def reserve(self, wanted: int) -> bool:
        """Whether `wanted` pages can be taken now, with memory behind each. Invalidates nothing.

        Where no memory is to be had the pool ends, until `regrow`.
        """
        while 0 < wanted <= self.available:
            highest = max(self.free[-wanted:], default=NO_PAGE)
            backed = self._back(highest)
            if highest < backed:
                return True
            self.limit = max(backed, NO_PAGE + 1)
            self.free = [page for page in self.free if page < backed]
        return wanted == 0

    def regrow(self) -> None:
        """Has there come memory for a pool that ended early? Then it is whole again, until more is missing."""
        if self.limit < self._most and self._back(self.limit) > self.limit:
            # No row ever had one of these.
            self.free = [*range(self._most - 1, self.limit - 1, -1), *self.free]
            self.limit = self._most

    def take(self, count: int) -> Ids:
        """Pages for one row to fill: invalidated here, before any row names them. They were reserved.

        Returns i64 [count].
        """
        left = max(len(self.free) - count, 0)
        ids = self.free[left:][::-1]
        del self.free[left:]
        ids += [self._evict() for _ in range(count - len(ids))]
        taken = np.array(ids, np.int64)
        self.holders[taken] = 1
        if count:
            generations = (self._tables.page_word[taken] >> _GENERATION_SHIFT) + np.uint64(1)
            words = generations << _GENERATION_SHIFT | np.uint64(PageState.FILLING)
            self._memory.put(self._tables.page_word, taken, words)
            self._hit("kvmanager.page_taken")
        return taken

    def _evict(self) -> int:
        """The least recently used cached page, out of the index. Its word still says sealed."""
        while True:
            used, page = heapq.heappop(self._eviction)
            if self._is_cached(page) and int(self._tables.page_used[page]) == used:
                self.index.remove(*self._names(page), page)
                self.cached -= 1
                self.holders[page] = 1  # now, or a second entry of the page would give it out twice
                return page

    def _is_cached(self, page: int) -> bool:
        return not self.holders[page] and state_of(self._tables.page_word[page]) == PageState.SEALED

    def hold(self, pages: Ids) -> None:
        """One more row names these sealed pages; none can be evicted from here on."""
        self.cached -= int(np.count_nonzero(self.holders[pages] == 0))
        self.holders[pages] += 1

    def release(self, pages: Ids) -> None:
        """A row that named these pages is gone, or does not name them any more."""
        self.holders[pages] -= 1
        loose = pages[self.holders[pages] == 0]
        sealed = self._tables.page_word[loose] & _STATE == PageState.SEALED
        self.free.extend(loose[~sealed][::-1].tolist())
        cached = loose[sealed]
        self.cached += len(cached)
        for item in zip(self._tables.page_used[cached].tolist(), cached.tolist(), strict=True):
            heapq.heappush(self._eviction, item)
        if len(self._eviction) > 2 * self.count:
            self._rebuild_eviction()

    def touch(self, chain: Ids) -> None:
        """Stamps a row's pages, head first: later turns are newer, and within a turn the tail goes first."""
        if not len(chain):
            return
        self.turn += 1
        depths = np.minimum(np.arange(len(chain), dtype=np.uint64), np.uint64(_DEEPEST))
        stamps = np.uint64(self.turn << TURN_SHIFT | _DEEPEST) - depths
        self._memory.put(self._tables.page_used, chain, stamps)

    def seal(self, page: int, content: Hash, parent: Hash, tokens: U32) -> None:
        """Immutable from here on. tokens: u32 [page_size]."""
        tables, put = self._tables, self._memory.put
        put(tables.page_hash, page, to_words(content))
        put(tables.page_parent, page, to_words(parent))
        put(tables.page_tokens, page, tokens)
        self._hit("kvmanager.seal.before_word")
        put(tables.page_word, page, page_word(PageState.SEALED, generation_of(tables.page_word[page])))
        self._hit("kvmanager.seal.after")
        self.index.add(content, parent, int(tokens[0]), page)

    def generations(self, pages: Ids) -> npt.NDArray[np.uint64]:
        """u64 [n]."""
        return self._tables.page_word[pages] >> _GENERATION_SHIFT

    @property
    def eviction_heap(self) -> Sequence[tuple[int, int]]:
        """(last use, page), as a heap: every cached page has its entry, and entries of others are skipped."""
        return self._eviction

    def eviction_order(self) -> list[int]:
        """Cached pages, those to be given up first in front."""
        valid = {item for item in self._eviction if self._is_cached(item[1])}
        return [page for used, page in sorted(valid) if int(self._tables.page_used[page]) == used]
