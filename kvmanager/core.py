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
from typing import TYPE_CHECKING

import numpy as np

from kvmanager.allocation import Allocator, Wants
from kvmanager.errors import Refusal, Refused
from kvmanager.forks import Fork, find_parent, tail_of
from kvmanager.integrity import check_integrity
from kvmanager.layout import U32, U64, Header, OutputLog, Tables, generation_of, usable_computed
from kvmanager.matching import PageCopy, match_pages, match_part
from kvmanager.memory import Memory
from kvmanager.pages import Ids, Pages
from kvmanager.pins import Pin, Pins
from kvmanager.prefix import Hash, from_words
from kvmanager.rows import Row, Rows
from kvmanager.sealing import Sealer
from kvmanager.source import Source

if TYPE_CHECKING:
    from kvmanager.integrity import Finding

_NOTHING = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Granted:
    """A row as it is now. `generation` 0: the row that the call relies on is gone."""

    row: int
    generation: int
    capacity: int  # tokens
    cached: int  # tokens in the whole pages that it shares
    copy: PageCopy | None = None  # into its first page of its own


_GONE = Granted(0, 0, 0, 0)


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
        self._memory = memory or Memory(hit)
        self._hit = hit
        self.page_size = int(tables.page_tokens.shape[1])
        self.pages = Pages(tables, self._memory, hit, back, len(tables.page_word) if limit is None else limit)
        self.rows = Rows(tables, self._memory, hit)
        self.pins = Pins(tables, self._memory, self.rows, self.pages)
        self._allocator = Allocator(tables, self.rows, self.pages, self.pins)
        self._sealer = Sealer(tables, self.rows, self.pages, sources, self._pin)
        self.prefix_cache = True
        self.hit_tokens = 0
        self.query_tokens = 0
        self.rebuild()

    def rebuild(self) -> None:
        """Derives everything from the tables."""
        self._hit("kvmanager.rebuild.before")
        self.rows.rebuild()
        self._sealer.rebuild()
        self.pins.rebuild()
        named = [*self.rows.live.values(), *self.rows.pinned.values()]
        self.pages.rebuild(np.concatenate([_NOTHING, *map(self.rows.pages, named)]))
        self._hit("kvmanager.rebuild.after")

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

    def ensure(self, key: str, index: int, capacity: int, headroom: int, keep_free: int) -> Granted:
        """Makes the output's row, over the longest cached prefix; see EnsureRequest. Raises Refused."""
        self._hit("kvmanager.ensure.before")
        source = self._source(key, index)
        output, row = source.outputs[index], self.rows.live.get((key, index))
        if row is None:
            shared = _NOTHING
            if self.prefix_cache:
                self._sealer.seal_alike(source.root, output.tokens[: output.known])
                shared = match_pages(self.tables, self.pages.index, source.root, output.tokens[: output.known])
            # Looked for before pages are taken: the row's own must not be found.
            copy = self._part(source, output, shared)
            row = self._make_row(key, index, source, shared, Wants(capacity, headroom, keep_free))
            granted = self._granted(row, copy)
            if self.prefix_cache:
                self.query_tokens += output.known
                self.hit_tokens += granted.cached + (granted.copy.tokens if granted.copy else 0)
        else:
            shared = self.rows.pages(row)[: row.sealed]
            granted = self._granted(row, None if output.computed else self._part(source, output, shared))
        self._hit("kvmanager.ensure.after")
        return granted

    def fork(
        self,
        key: str,
        index: int,
        from_index: int,
        from_generation: int,
        length: int,
        capacity: int,
        headroom: int,
        keep_free: int,
    ) -> Granted:
        """Makes the row of output `index` over the first `length` tokens of a sibling's. Raises Refused."""
        self._hit("kvmanager.fork.before")
        source = self._source(key, max(index, from_index))
        row, copy = self.rows.live.get((key, index)), None
        fork = Fork(key, index, from_index, from_generation, length)
        parent = find_parent(self.tables, self.rows, source, fork)
        if parent is None and row is None:
            return _GONE
        whole = length // self.page_size
        # Of a row that is there already: until something is computed, and if it was made for this length.
        if parent is not None and (row is None or (row.sealed == whole and not source.outputs[index].computed)):
            copy = tail_of(self.tables, self.rows, parent, length)
            if row is None:
                # Only sealed pages may be in two rows, also where nobody looks for prefixes.
                self._sealer.seal(parent, source)
                shared = self.rows.pages(parent)[:whole]
                row = self._make_row(key, index, source, shared, Wants(capacity, headroom, keep_free))
        assert row is not None
        self._hit("kvmanager.fork.after")
        return self._granted(row, copy)

    def ensure_rows(self, rows: Ids, generations: U64, capacities: Ids, headrooms: Ids) -> Ids:
        """Makes rows longer, those in front first; see EnsureRowsRequest. Raises Refused.

        rows, capacities, headrooms: i64 [n]; generations: u64 [n]. Returns tokens that each holds now, i64 [n].
        """
        self._hit("kvmanager.ensure_rows.before")
        grown, capacities = self._allocator.grow(rows, generations, capacities, headrooms)
        for row in grown:
            self._sealer.grew(row)
        self._hit("kvmanager.ensure_rows.after")
        return capacities

    def trim(self, key: str, index: int, generation: int, capacity: int) -> None:
        """Gives back tail pages beyond `capacity` tokens, never one that holds a computed token, nor the first."""
        row, source = self._current(key, index, generation), self.sources(key)
        if row is not None and source is not None:
            written = usable_computed(self.tables, row.number, source.outputs[index].computed)
            kept = -(-max(capacity, written, 1) // self.page_size)
            if kept < row.length:
                dropped = self.rows.pages(row, kept)
                self.rows.shrink(row, kept)
                self.pages.release(dropped)
        self._hit("kvmanager.trim.after")

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
        if not self.prefix_cache:
            return 0
        return len(match_pages(self.tables, self.pages.index, root, tokens)) * self.page_size

    def seal_all(self) -> int:
        """Seals what has filled up since; how many pages."""
        return self._sealer.seal_all() if self.prefix_cache else 0

    def unpin(self, pin: Pin) -> bool:
        """Whether there was such a pin."""
        return self.pins.remove(pin)

    def check_integrity(self) -> list[Finding]:
        """What is wrong; empty when all is well."""
        return check_integrity(self)

    # --- rows ---

    def _source(self, key: str, index: int) -> Source:
        source = self.sources(key)
        if source is None or index >= len(source.outputs):
            raise Refused(Refusal.NOT_FOUND, f"no record {key} with an output {index}")
        return source

    def _granted(self, row: Row, copy: PageCopy | None) -> Granted:
        if copy is not None:
            # Taking pages may have evicted it, and a row without a page of its own has no place for it.
            is_there = generation_of(self.tables.page_word[copy.page]) == copy.generation
            copy = copy if is_there and row.length > row.sealed else None
        size = self.page_size
        return Granted(row.number, row.generation, row.length * size, row.sealed * size, copy)

    def _part(self, source: Source, output: OutputLog, shared: Ids) -> PageCopy | None:
        """What is cached of the page behind the `shared` ones."""
        if not self.prefix_cache:
            return None
        parent = from_words(self.tables.page_hash[shared[-1]]) if len(shared) else source.root
        rest = output.tokens[len(shared) * self.page_size : output.known]
        return match_part(self.tables, self.pages.index, parent, rest)

    def _make_row(self, key: str, index: int, source: Source, shared: Ids, wants: Wants) -> Row:
        output = source.outputs[index]
        if output.computed:
            # Pages would count as written that never were: the executor lowers `computed` before it closes a row.
            raise Refused(Refusal.INVALID, f"output {index} of {key} has no row, yet {output.computed} tokens computed")
        row = self._allocator.make(key, index, shared, wants.within(output.capacity))
        self._sealer.made(row, source)
        return row

    def _pin(self, row: Row, source: Source) -> None:
        """Pins the prompt as soon as it is sealed, if its request asks for that."""
        if source.pin is not None and row.index == 0:
            whole = source.outputs[0].prompt_length // self.page_size
            if 0 < whole <= row.sealed:
                self._hit("kvmanager.pin.before")
                self.pins.set(source.pin, self.rows.pages(row)[:whole])

    def _close(self, row: Row) -> None:
        source = self.sources(row.key)
        if source is not None and self.prefix_cache:
            self._sealer.seal(row, source)
            self._pin(row, source)
        self._release(row)

    def _release(self, row: Row) -> None:
        pages = self.rows.pages(row)
        self.pages.touch(pages)
        self.rows.release(row)
        self.pages.release(pages)

    def _current(self, key: str, index: int, generation: int) -> Row | None:
        """The row that the call is about, unless it is gone already."""
        row = self.rows.live.get((key, index))
        if row is not None and generation > row.generation:
            raise Refused(Refusal.INVALID, f"row generation {generation} of {key} was never given out")
        return row if row is not None and generation == row.generation else None
