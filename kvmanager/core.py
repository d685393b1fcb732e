"""The manager's core: rows over pages, sharing, sealing, epochs. Pure: no clock, no file, no socket.

Invariants
 1. A page is invalidated (filling, generation + 1) before a row names it.
 2. A row becomes live by one store of its word, after key, entries and length; it grows by one store
    of its length, after the entries.
 3. A live row only grows, except that `trim` drops unwritten tail pages.
 4. Only sealed pages are in more than one row.
 5. Every derived structure equals `rebuild()` of the tables after every call; `check_integrity` compares.

So a death between any two stores leaves tables that `rebuild()` reads as the state before or after the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvmanager.errors import Refusal, Refused
from kvmanager.integrity import check_integrity
from kvmanager.layout import U32, Header, OutputLog, PageState, Tables, usable_computed
from kvmanager.memory import Memory
from kvmanager.pages import Ids, Pages
from kvmanager.prefix import Hash, from_words, page_hash
from kvmanager.rows import Row, Rows


@dataclass(frozen=True, slots=True)
class Source:
    """What the core needs of a record: its outputs' logs and where its hash chains start."""

    outputs: list[OutputLog]
    root: Hash


@dataclass(frozen=True, slots=True)
class Granted:
    """A row as it is now. `capacity` 0: the call was about a row that is gone."""

    row: int
    generation: int
    capacity: int  # tokens
    cached: int  # tokens shared when the row was made


class ManagerCore:
    """All calls are wanted end states: repeating one is harmless. A refused call changes nothing."""

    def __init__(
        self,
        tables: Tables,
        sources: Callable[[str], Source | None],
        memory: Memory | None = None,
        hit: Callable[[str], None] = lambda name: None,
        back: Callable[[int], int] = lambda page: page + 1,
        limit: int | None = None,
    ) -> None:
        """Adopts what the tables say.

        sources(key): the record's logs; None when there is no such record.
        back(page): tries to put memory behind the pool up to and with `page`; how many pages have some.
        limit: pages from this id on are not used.
        """
        self.tables = tables
        self.sources = sources
        self._memory = memory or Memory()
        self._hit = hit
        self.page_size = int(tables.page_tokens.shape[1])
        self.pages = Pages(tables, self._memory, hit, back, len(tables.page_word) if limit is None else limit)
        self.rows = Rows(tables, self._memory)
        self.prefix_cache = True
        self.hit_tokens = 0
        self.query_tokens = 0
        self.rebuild()

    def rebuild(self) -> None:
        """Derives everything from the tables."""
        self.rows.rebuild()
        live = self.rows.live.values()
        for row in live:
            row.sealed = self._leading_sealed(row)
        self.pages.rebuild(np.concatenate([np.zeros(0, np.int64), *map(self.rows.pages, live)]))

    def _leading_sealed(self, row: Row) -> int:
        sealed = self.tables.page_word[self.rows.pages(row)] & np.uint64(0xFF) == PageState.SEALED
        return row.length if sealed.all() else int(np.argmin(sealed))

    # --- epochs ---

    @property
    def epoch(self) -> int:
        return int(self.tables.header[Header.EPOCH])

    def attach(self, executor_id: bytes) -> int:
        """The epoch of this executor: the one there, or the next. It holds executor.lock.

        All earlier executors are dead then, so rows without a record are given back. The id is
        stored last: a death before it makes one epoch more, and repeats the rest.
        """
        header, put = self.tables.header, self._memory.put
        words = np.frombuffer(executor_id, np.uint64)
        own = slice(Header.EXECUTOR_ID, Header.EXECUTOR_ID + 2)
        if (header[own] == words).all():
            return self.epoch
        put(header, Header.EPOCH, self.epoch + 1)
        for row in list(self.rows.live.values()):
            if self.sources(row.key) is None:
                self._release(row)
        put(header, own, words)
        return self.epoch

    # --- calls ---

    def ensure(self, key: str, index: int, generation: int, capacity: int, headroom: int, keep_free: int) -> Granted:
        """Makes the row hold `capacity` tokens; see EnsureRequest. Raises Refused."""
        self._hit("kvmanager.ensure.before")
        source = self.sources(key)
        if source is None or index >= len(source.outputs):
            raise Refused(Refusal.NOT_FOUND, f"no record {key} with an output {index}")
        output = source.outputs[index]
        row = self.rows.live.get((key, index))
        if generation and (row is None or generation < row.generation):
            return Granted(0, generation, 0, 0)
        if row is not None and generation > row.generation:
            raise Refused(Refusal.INVALID, f"row generation {generation} of {key} was never given out")
        most = min(self.rows.capacity, self.pages.usable)
        need = self._pages_for(min(capacity, output.capacity))
        if need > most:
            raise Refused(Refusal.TOO_LARGE, f"{capacity} tokens are more than the {most} pages that a row can get")
        wish = min(self._pages_for(min(capacity + headroom, output.capacity)), most)
        if row is None:
            granted = self._make_row(key, index, source, need, wish, keep_free)
        else:
            self._seal_row(row, source)
            # A first ensure that is repeated is told again what was shared: nothing has been computed since.
            cached = 0 if generation else row.sealed * self.page_size
            self._grow(row, need, wish, keep_free)
            granted = Granted(row.number, row.generation, row.length * self.page_size, cached)
        self._hit("kvmanager.ensure.after")
        return granted

    def trim(self, key: str, index: int, generation: int, capacity: int) -> None:
        """Gives back tail pages beyond `capacity` tokens, never one that holds a computed token."""
        row, source = self._current(key, index, generation), self.sources(key)
        if row is None or source is None:
            return
        written = usable_computed(self.tables, row.number, source.outputs[index].computed)
        kept = self._pages_for(max(capacity, written))
        if kept < row.length:
            dropped = self.rows.pages(row, kept)
            self.rows.shrink(row, kept)
            self.pages.release(dropped)

    def close(self, key: str, index: int, generation: int) -> None:
        """Gives the row back. What is full is sealed first, and stays cached."""
        self._hit("kvmanager.close.before")
        row = self._current(key, index, generation)
        if row is not None:
            self._close(row)
        self._hit("kvmanager.close.after")

    def close_all(self, key: str) -> None:
        """For a record that goes away while no executor is alive."""
        for row in [row for row in self.rows.live.values() if row.key == key]:
            self._close(row)

    def has_rows(self, key: str) -> bool:
        return any(row.key == key for row in self.rows.live.values())

    @property
    def live_rows(self) -> dict[tuple[str, int], Row]:
        """By (key, output index)."""
        return self.rows.live

    def cached_tokens(self, root: Hash, tokens: U32) -> int:
        """How much of a prompt the index holds now: a look, nothing is pinned. tokens: u32 [n]."""
        return len(self._match(root, tokens)) * self.page_size if self.prefix_cache else 0

    def seal_all(self) -> int:
        """Seals what has filled up since; how many pages."""
        sealed = 0
        for row in self.rows.live.values():
            source = self.sources(row.key)
            if source is not None:
                sealed += self._seal_row(row, source)
        return sealed

    def check_integrity(self) -> list[str]:
        """What is wrong, in words; empty when all is well."""
        return check_integrity(self)

    # --- rows ---

    def _make_row(self, key: str, index: int, source: Source, need: int, wish: int, keep_free: int) -> Granted:
        output = source.outputs[index]
        if output.computed:
            # Pages would count as written that never were: the executor lowers `computed` before it closes a row.
            raise Refused(Refusal.INVALID, f"output {index} of {key} has no row, yet {output.computed} tokens computed")
        if not self.rows.free:
            raise Refused(Refusal.NO_ROWS, "all rows are in use")
        shared = np.zeros(0, np.int64)
        if self.prefix_cache:
            self.seal_all()
            shared = self._match(source.root, output.tokens[: output.known])
        fresh = max(need - len(shared), 0)
        # Held before any page is taken, or taking could evict one of them.
        self.pages.hold(shared)
        try:
            extra = self._reserve(fresh, wish - len(shared) - fresh, keep_free)
        except Refused:
            self.pages.release(shared)
            raise
        pages = np.concatenate([shared, self.pages.take(fresh + extra)])
        row = self.rows.make(key, index, pages, self.pages.generations(pages), len(shared))
        cached = len(shared) * self.page_size
        if self.prefix_cache:
            self.query_tokens += output.known
            self.hit_tokens += cached
        return Granted(row.number, row.generation, row.length * self.page_size, cached)

    def _grow(self, row: Row, need: int, wish: int, keep_free: int) -> None:
        fresh = max(need - row.length, 0)
        extra = self._reserve(fresh, wish - row.length - fresh, keep_free)
        if fresh + extra:
            pages = self.pages.take(fresh + extra)
            self.rows.append(row, pages, self.pages.generations(pages))

    def _reserve(self, fresh: int, wish: int, keep_free: int) -> int:
        """Makes sure of `fresh` pages. Returns how many of the `wish` beyond them may be taken too."""
        left = self.pages.available - fresh
        if fresh and (left < keep_free or not self.pages.reserve(fresh)):
            raise Refused(Refusal.NO_PAGES, f"{fresh} pages wanted, {self.pages.available} left")
        watermark = max(1, self.pages.usable // 100, keep_free)
        extra = max(min(wish, self.pages.available - fresh - watermark), 0)
        return extra if extra and self.pages.reserve(fresh + extra) else 0

    def _close(self, row: Row) -> None:
        source = self.sources(row.key)
        if source is not None:
            self._seal_row(row, source)
        self._release(row)

    def _release(self, row: Row) -> None:
        pages = self.rows.pages(row)
        self.pages.touch(pages)
        self.rows.release(row)
        self.pages.release(pages)

    def _seal_row(self, row: Row, source: Source) -> int:
        """Seals the row's pages that lie wholly below `computed`; how many."""
        output, size = source.outputs[row.index], self.page_size
        full = min(output.computed // size, row.length)
        done = row.sealed
        if not self.prefix_cache or done >= full:
            return 0
        pages = self.rows.pages(row)[:full].tolist()
        parent = from_words(self.tables.page_hash[pages[done - 1]]) if done else source.root
        for number in range(done, full):
            tokens = output.tokens[number * size : (number + 1) * size]
            content = page_hash(parent, tokens)
            self.pages.seal(pages[number], content, parent, tokens)
            row.sealed = number + 1
            parent = content
        return full - done

    def _match(self, root: Hash, tokens: U32) -> Ids:
        """The longest chain of sealed pages that starts `tokens`, i64 [pages]; whole pages only.

        All of `tokens` may be covered: the last position then runs again for its logits.
        """
        size, parent = self.page_size, root
        matched: list[int] = []
        for start in range(0, len(tokens) - size + 1, size):
            parent = page_hash(parent, tokens[start : start + size])
            page = self.pages.index.get(parent)
            if page is None:
                break
            matched.append(page)
        pages = np.array(matched, np.int64)
        # A hash is a hint; the tokens decide.
        same = (self.tables.page_tokens[pages] == tokens[: len(pages) * size].reshape(-1, size)).all(axis=1)
        return pages if same.all() else pages[: int(np.argmin(same))]

    def _current(self, key: str, index: int, generation: int) -> Row | None:
        """The row that the call is about, unless it is gone already."""
        row = self.rows.live.get((key, index))
        if row is not None and generation > row.generation:
            raise Refused(Refusal.INVALID, f"row generation {generation} of {key} was never given out")
        return row if row is not None and generation == row.generation else None

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
