"""The manager's core: rows over pages, sharing, sealing. Pure: no clock, no file, no socket.

Invariants (docs/guarantees.md says what they are for):
 1. A page is invalidated (filling, generation + 1) before a row names it.
 2. A row becomes live by one store of its word, after key, entries and length.
 3. A live row only grows, except that `trim` drops unwritten tail pages.
 4. Only sealed pages are in more than one row.
 5. Every derived structure equals `rebuild()` of the tables; `check_integrity` compares.

    row word   FREE --ensure--> LIVE --close--> FREE, generation + 1 when it is made again
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from kvmanager.layout import (
    LOW32,
    NO_PAGE,
    OutputLog,
    PageState,
    RowState,
    Tables,
    entry,
    generation_of,
    index_of,
    key_words,
    page_of,
    row_word,
    state_of,
    usable_computed,
    words_key,
)
from kvmanager.memory import Memory
from kvmanager.pages import Pages
from kvmanager.prefix import Hash, chain, from_words, page_hash


class Refusal(Enum):
    NOT_FOUND = auto()
    NO_PAGES = auto()
    NO_ROWS = auto()
    TOO_LARGE = auto()


class Refused(Exception):
    """The call changed nothing."""

    def __init__(self, reason: Refusal, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Source:
    """What the core needs of a record: its outputs' logs and where its hash chains start."""

    outputs: list[OutputLog]
    root: Hash


@dataclass(frozen=True, slots=True)
class Granted:
    row: int
    generation: int
    capacity: int  # tokens
    cached: int  # tokens shared when the row was made


class ManagerCore:
    """All calls are wanted end states: repeating one is harmless."""

    def __init__(
        self,
        tables: Tables,
        sources: Callable[[str], Source | None],
        memory: Memory | None = None,
        hit: Callable[[str], None] = lambda name: None,
        back: Callable[[int], bool] = lambda page: True,
    ) -> None:
        self._tables = tables
        self._sources = sources
        self._memory = memory or Memory()
        self._hit = hit
        self.page_size = int(tables.page_tokens.shape[1])
        self.pages = Pages(tables, self._memory, hit, back)
        self.prefix_cache = True
        self.hit_tokens = 0
        self.query_tokens = 0
        self._rows: dict[tuple[str, int], int] = {}
        self._free_rows: list[int] = []
        self._sealed: dict[int, int] = {}  # row -> leading pages known to be sealed
        self.rebuild()

    def rebuild(self) -> None:
        """Derives everything from the tables."""
        tables = self._tables
        live = (tables.row_word & np.uint64(0xFF) == RowState.LIVE).tolist()
        self._rows = {}
        self._free_rows = []
        self._sealed = {}
        held: list[int] = []
        for row in range(len(live) - 1, -1, -1):
            if live[row]:
                self._rows[words_key(tables.row_key[row]), index_of(int(tables.row_word[row]))] = row
                held.extend(self._row_pages(row))
            else:
                self._free_rows.append(row)
        self.pages.rebuild(np.array(held, np.int64))

    # --- calls ---

    def ensure(self, key: str, index: int, generation: int, capacity: int, headroom: int, keep_free: int) -> Granted:
        """See EnsureRequest. Raises Refused; then nothing has changed."""
        self._hit("kvmanager.ensure.before")
        source = self._sources(key)
        if source is None or index >= len(source.outputs):
            raise Refused(Refusal.NOT_FOUND, f"no record {key} with an output {index}")
        row = self._rows.get((key, index))
        if row is not None and generation and generation != self._generation(row):
            return Granted(row, generation, capacity, 0)  # about an older row: done long ago
        need = self._pages_for(capacity)
        most = min(self._tables.row_entry.shape[1], self.pages.limit - 1)
        if need > most:
            raise Refused(Refusal.TOO_LARGE, f"{capacity} tokens are more than {most} pages can hold")
        wish = min(self._pages_for(capacity + headroom), self._pages_for(source.outputs[index].capacity), most)
        if row is None:
            granted = self._make_row(key, index, source, need, wish, keep_free)
        else:
            self.seal_row(row)
            self._grow(row, need, wish, keep_free)
            granted = Granted(row, self._generation(row), self._capacity(row), 0)
        self._hit("kvmanager.ensure.after")
        return granted

    def trim(self, key: str, index: int, generation: int, capacity: int) -> None:
        """Gives back tail pages beyond `capacity` tokens, never one that holds a computed token."""
        row = self._current(key, index, generation)
        if row is None:
            return
        source = self._sources(key)
        computed = source.outputs[index].computed if source else 0
        length = int(self._tables.row_length[row])
        kept = max(self._pages_for(capacity), self._pages_for(usable_computed(self._tables, row, computed)))
        if kept < length:
            dropped = self._row_pages(row)[kept:]
            self._memory.put(self._tables.row_length, row, kept)
            for page in dropped:
                self.pages.release(page)

    def close(self, key: str, index: int, generation: int) -> None:
        """Gives the row back. What is full is sealed first, and stays cached."""
        self._hit("kvmanager.close.before")
        row = self._current(key, index, generation)
        if row is not None:
            self.seal_row(row)
            self._free_row(row)
        self._hit("kvmanager.close.after")

    def close_all(self, key: str) -> None:
        """For a record that goes away while nobody is attached."""
        for held_key, index in list(self._rows):
            if held_key == key:
                self.close(key, index, 0)

    def has_rows(self, key: str) -> bool:
        return any(held == key for held, _ in self._rows)

    def cached_tokens(self, root: Hash, tokens: np.ndarray) -> int:
        """How much of a prompt the index holds now: a look, nothing is pinned."""
        return len(self._match(root, tokens)) * self.page_size

    def seal_all(self) -> None:
        for row in list(self._rows.values()):
            self.seal_row(row)

    def seal_row(self, row: int) -> None:
        """Seals the row's pages that lie wholly below `computed`."""
        tables = self._tables
        key, index = words_key(tables.row_key[row]), index_of(int(tables.row_word[row]))
        source = self._sources(key)
        if source is None:
            return
        output = source.outputs[index]
        full = min(output.computed // self.page_size, int(tables.row_length[row]))
        done = self._sealed.get(row, 0)
        if done >= full:
            return
        pages = self._row_pages(row)
        parent = source.root if done == 0 else from_words(tables.page_hash[pages[done - 1]])
        for number in range(done, full):
            page, start = pages[number], number * self.page_size
            tokens = output.tokens[start : start + self.page_size]
            content = page_hash(parent, tokens)
            if self.pages.state(page) is not PageState.SEALED:
                self.pages.seal(page, content, parent, tokens)
            parent = content
        self._sealed[row] = full

    # --- rows ---

    def _make_row(self, key: str, index: int, source: Source, need: int, wish: int, keep_free: int) -> Granted:
        if not self._free_rows:
            raise Refused(Refusal.NO_ROWS, "all rows are in use")
        output = source.outputs[index]
        shared: list[int] = []
        if self.prefix_cache:
            self.seal_all()
            tokens = output.tokens[: output.known]
            shared = self._match(source.root, tokens)[:most_shared(output.known, self.page_size)]
            self.query_tokens += output.known
        cached = sum(1 for page in shared if self.pages.holders[page] == 0)
        fresh = max(need - len(shared), 0)
        if fresh + keep_free > self.pages.available - cached or not self.pages.reserve(fresh):
            raise Refused(Refusal.NO_PAGES, f"{fresh} pages wanted, {self.pages.available - cached} left")
        row = self._free_rows.pop()
        for page in shared:  # before any page is taken, or taking could evict one of them
            self.pages.hold(page)
        taken = [self.pages.take() for _ in range(fresh + self._extra(fresh, wish - len(shared)))]
        tables, put = self._tables, self._memory.put
        pages = shared + taken
        entries = np.array([entry(page, self.pages.generation(page)) for page in pages], np.uint64)
        put(tables.row_key, row, key_words(key))
        put(tables.row_entry, (row, slice(0, len(pages))), entries)
        put(tables.row_length, row, len(pages))
        generation = self._generation(row) + 1
        put(tables.row_word, row, row_word(RowState.LIVE, index, generation))
        self._rows[key, index] = row
        self._sealed[row] = len(shared)
        self.pages.touch(shared)
        self.hit_tokens += len(shared) * self.page_size
        return Granted(row, generation, len(pages) * self.page_size, len(shared) * self.page_size)

    def _grow(self, row: int, need: int, wish: int, keep_free: int) -> None:
        tables = self._tables
        length = int(tables.row_length[row])
        fresh = max(need - length, 0)
        if fresh and (fresh + keep_free > self.pages.available or not self.pages.reserve(fresh)):
            raise Refused(Refusal.NO_PAGES, f"{fresh} pages wanted, {self.pages.available} left")
        for number in range(length, length + fresh + self._extra(fresh, wish - length)):
            page = self.pages.take()
            self._memory.put(tables.row_entry, (row, number), entry(page, self.pages.generation(page)))
            self._memory.put(tables.row_length, row, number + 1)

    def _extra(self, fresh: int, wish: int) -> int:
        """Pages beyond the need, above the watermark only."""
        watermark = max(1, self.pages.count // 100)
        extra = max(min(wish - fresh, self.pages.available - fresh - watermark), 0)
        return extra if extra and self.pages.reserve(fresh + extra) else 0

    def _free_row(self, row: int) -> None:
        tables = self._tables
        word = int(tables.row_word[row])
        pages = self._row_pages(row)
        self.pages.touch(pages)
        self._memory.put(tables.row_word, row, row_word(RowState.FREE, 0, generation_of(word)))
        del self._rows[words_key(tables.row_key[row]), index_of(word)]
        self._sealed.pop(row, None)
        self._free_rows.append(row)
        for page in pages:
            self.pages.release(page)

    def _match(self, root: Hash, tokens: np.ndarray) -> list[int]:
        matched: list[int] = []
        for content in chain(root, tokens, self.page_size):
            page = self.pages.index.get(content)
            if page is None:
                break
            matched.append(page)
        return matched

    def _current(self, key: str, index: int, generation: int) -> int | None:
        """The row that the call is about, unless it is gone already."""
        row = self._rows.get((key, index))
        return row if row is not None and generation in (0, self._generation(row)) else None

    def _generation(self, row: int) -> int:
        return generation_of(int(self._tables.row_word[row]))

    def _capacity(self, row: int) -> int:
        return int(self._tables.row_length[row]) * self.page_size

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _row_pages(self, row: int) -> list[int]:
        entries = self._tables.row_entry[row, : int(self._tables.row_length[row])]
        return [page for page in (entries & np.uint64(LOW32)).tolist() if page != NO_PAGE]

    @property
    def live_rows(self) -> dict[tuple[str, int], int]:
        return self._rows

    # --- integrity ---

    def check_integrity(self) -> list[str]:
        """What is wrong, in words; empty when all is well."""
        wrong: list[str] = []
        tables, pages = self._tables, self.pages
        held = np.zeros(pages.count, np.int32)
        for (key, index), row in self._rows.items():
            word = int(tables.row_word[row])
            if state_of(word) != RowState.LIVE or words_key(tables.row_key[row]) != key or index_of(word) != index:
                wrong.append(f"row {row} is not the row of {key}/{index}")
            for number, item in enumerate(tables.row_entry[row, : int(tables.row_length[row])].tolist()):
                page = page_of(item)
                if page == NO_PAGE:
                    continue
                held[page] += 1
                if generation_of(item) != pages.generation(page):
                    wrong.append(f"row {row} entry {number} names page {page} of another generation")
                if pages.state(page) is PageState.FREE:
                    wrong.append(f"row {row} entry {number} names the free page {page}")
        if (held != pages.holders).any():
            wrong.append(f"pages are counted wrong: {np.flatnonzero(held != pages.holders).tolist()}")
        filling = tables.page_word & np.uint64(0xFF) == PageState.FILLING
        if (held[filling] > 1).any():
            wrong.append("a page that is being filled is in two rows")
        sealed = tables.page_word & np.uint64(0xFF) == PageState.SEALED
        loose = set(np.flatnonzero((held == 0) & ~sealed).tolist()) - {NO_PAGE}
        if loose != set(pages.free) or len(pages.free) != len(loose):
            wrong.append("the free list is not the set of free pages")
        lowest: dict[Hash, int] = {}
        for page in np.flatnonzero(sealed).tolist():
            lowest.setdefault(from_words(tables.page_hash[page]), page)
        if lowest != pages.index:
            wrong.append("the prefix index does not name the lowest sealed page of each hash")
        live = int(np.count_nonzero(tables.row_word & np.uint64(0xFF) == RowState.LIVE))
        if live != len(self._rows) or len(self._free_rows) != len(tables.row_word) - live:
            wrong.append("the row map is not the set of live rows")
        return wrong


def most_shared(known: int, page_size: int) -> int:
    """Whole pages that may be shared: all of them; the last position then runs again for its logits."""
    return known // page_size
