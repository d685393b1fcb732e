"""The simulator is worth what it finds: each planted fault must end in a Violation that names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from kvmanager import core as core_module
from kvmanager.allocation import Allocator, Wants
from kvmanager.core import Granted, ManagerCore
from kvmanager.forks import Fork
from kvmanager.keys import key_words
from kvmanager.layout import U32, U64, Header, PageState, RowState, Tables, entry, page_word, row_word
from kvmanager.matching import PageCopy, match_pages
from kvmanager.memory import Memory
from kvmanager.pages import Ids, Pages
from kvmanager.pins import Pin, Pins
from kvmanager.prefix import Hash, PrefixIndex, root_hash, to_words
from kvmanager.rows import Row, Rows
from kvmanager.sealing import Sealer
from kvmanager.source import Source
from tests.faults.simulator.faults import Violation
from tests.faults.simulator.stores.executor import Executor
from tests.faults.simulator.stores.requests import PAGE_SIZE
from tests.faults.simulator.stores.running import Running
from tests.faults.simulator.stores.schedule import Schedule, run
from tests.faults.simulator.test_stores import SHORT

Patch = pytest.MonkeyPatch

_AT_STORES = 110  # of a short life: the manager dies before each of them
_RANDOM = 120


def _take_without_word(pages: Pages, count: int) -> Ids:
    taken = np.array([pages.free.pop() if pages.free else pages._evict() for _ in range(count)], np.int64)
    pages.holders[taken] = 1
    return taken


def row_entry_before_page_word(patch: Patch) -> None:
    """Reuse in the wrong order: the row names the next generation, then the page is invalidated."""
    late: dict[int, int] = {}

    def take(self: Pages, count: int) -> Ids:
        taken = _take_without_word(self, count)
        late.clear()
        late.update({page: int(self.generations(taken)[i]) + 1 for i, page in enumerate(taken.tolist())})
        return taken

    def invalidate(self: Rows) -> None:
        for page, generation in late.items():
            self._memory.put(self._tables.page_word, page, page_word(PageState.FILLING, generation))

    def renamed(pages: Ids, generations: np.ndarray) -> U64:
        pairs = zip(pages.tolist(), generations.tolist(), strict=True)
        return np.array([late.get(page, generation) for page, generation in pairs], np.uint64)

    real_extend, real_make = Rows.extend, Rows.make

    def extend(self: Rows, numbers: Ids, counts: Ids, pages: Ids, generations: np.ndarray) -> list[Row]:
        rows = real_extend(self, numbers, counts, pages, renamed(pages, generations))
        invalidate(self)
        return rows

    def make(self: Rows, key: str, index: int, pages: Ids, generations: np.ndarray, sealed: int) -> Row:
        row = real_make(self, key, index, pages, renamed(pages, generations), sealed)
        invalidate(self)
        return row

    patch.setattr(Pages, "take", take)
    patch.setattr(Rows, "extend", extend)
    patch.setattr(Rows, "make", make)


def generation_not_counted(patch: Patch) -> None:
    def take(self: Pages, count: int) -> Ids:
        taken = _take_without_word(self, count)
        for page, generation in zip(taken.tolist(), self.generations(taken).tolist(), strict=True):
            self._memory.put(self._tables.page_word, page, page_word(PageState.FILLING, generation))
        return taken

    patch.setattr(Pages, "take", take)


def page_sealed_early(patch: Patch) -> None:
    """A page that is only partly computed counts as full."""
    real = Sealer.seal

    class Ahead:
        def __init__(self, output: object) -> None:
            self._output = output

        def __getattr__(self, name: str) -> object:
            if name == "computed":
                return min(self._output.computed + 1, self._output.known)  # type: ignore[attr-defined]
            return getattr(self._output, name)

    def seal(self: Sealer, row: Row, source: Source) -> int:
        outputs = [Ahead(output) for output in source.outputs]
        return real(self, row, replace(source, outputs=outputs))  # type: ignore[arg-type]

    patch.setattr(Sealer, "seal", seal)


def page_freed_under_a_row(patch: Patch) -> None:
    """A shared page is given back by the first row that closes."""
    real = Pages.release

    def release(self: Pages, pages: Ids) -> None:
        shared = pages[self.holders[pages] > 1]
        real(self, pages)
        self.free.extend(shared.tolist())

    patch.setattr(Pages, "release", release)


def page_evicted_under_a_row(patch: Patch) -> None:
    """What a new row shares is held only when its other pages are taken already."""
    real = Allocator.make

    def make(self: Allocator, key: str, index: int, shared: Ids, wants: Wants) -> Row:
        pages = self._pages
        take, hold = pages.take, pages.hold

        def take_then_hold(count: int) -> Ids:
            taken = take(count)
            hold(shared)
            return taken

        vars(pages).update(hold=lambda held: None, release=lambda held: None, take=take_then_hold)
        try:
            return real(self, key, index, shared, wants)
        finally:
            for name in ("hold", "release", "take"):
                del vars(pages)[name]

    patch.setattr(Allocator, "make", make)


def seal_word_before_contents(patch: Patch) -> None:
    def seal(self: Pages, page: int, content: Hash, parent: Hash, tokens: U32) -> None:
        tables, put = self._tables, self._memory.put
        put(tables.page_word, page, page_word(PageState.SEALED, int(tables.page_word[page]) >> 32))
        put(tables.page_hash, page, to_words(content))
        put(tables.page_parent, page, to_words(parent))
        put(tables.page_tokens, page, tokens)
        self.index.add(content, parent, int(tokens[0]), page)

    patch.setattr(Pages, "seal", seal)


def row_live_before_its_entries(patch: Patch) -> None:
    def write(self: Rows, row: Row, state: RowState, pages: Ids, generations: np.ndarray) -> None:
        tables, put = self._tables, self._memory.put
        put(tables.row_key, row.number, key_words(row.key))
        put(tables.row_length, row.number, len(pages))
        put(tables.row_word, row.number, row_word(state, row.index, row.generation))
        entries = pages.astype(np.uint64) | generations << np.uint64(32)
        put(tables.row_entry, (row.number, slice(0, len(pages))), entries)
        self._enter(row, state)

    patch.setattr(Rows, "_write", write)


def length_before_entries(patch: Patch) -> None:
    def extend(self: Rows, numbers: Ids, counts: Ids, pages: Ids, generations: np.ndarray) -> list[Row]:
        rows, taken = [self._numbered[number] for number in numbers.tolist()], 0
        for row, count in zip(rows, counts.tolist(), strict=True):
            start, row.length = row.length, row.length + count
            self._memory.put(self._tables.row_length, row.number, row.length)
            for place in range(count):
                word = entry(int(pages[taken]), int(generations[taken]))
                self._memory.put(self._tables.row_entry, (row.number, start + place), word)
                taken += 1
        return rows

    patch.setattr(Rows, "extend", extend)


def trim_of_computed_pages(patch: Patch) -> None:
    def trim(self: ManagerCore, key: str, index: int, generation: int, capacity: int) -> None:
        row = self._current(key, index, generation)
        if row is not None and row.length > 1:
            dropped = self.rows.pages(row, row.length - 1)
            self.rows.shrink(row, row.length - 1)
            self.pages.release(dropped)

    patch.setattr(ManagerCore, "trim", trim)


def salt_left_out(patch: Patch) -> None:
    """Prefixes are matched from all roots, whoever asks."""
    roots = [root_hash("model", "tenant", salt) for salt in ("salt", "")]

    def match(tables: Tables, index: PrefixIndex, root: Hash, tokens: U32) -> Ids:
        found = [match_pages(tables, index, other, tokens) for other in roots]
        return max(found, key=len)

    patch.setattr(core_module, "match_pages", match)


def epoch_not_counted(patch: Patch) -> None:
    def attach(self: ManagerCore, executor_id: bytes) -> int:
        own = slice(Header.EXECUTOR_ID, Header.EXECUTOR_ID + 2)
        Memory().put(self.tables.header, own, np.frombuffer(executor_id, np.uint64))
        return self.epoch

    patch.setattr(ManagerCore, "attach", attach)


def a_repeated_ensure_makes_another_row(patch: Patch) -> None:
    real = ManagerCore.ensure

    def ensure(self: ManagerCore, key: str, index: int, *wants: int) -> Granted:
        self.rows.live.pop((key, index), None)
        return real(self, key, index, *wants)

    patch.setattr(ManagerCore, "ensure", ensure)


def every_ensure_rows_grows(patch: Patch) -> None:
    """So a repeated one grows twice."""
    real = ManagerCore.ensure_rows

    def ensure_rows(self: ManagerCore, rows: Ids, generations: U64, capacities: Ids, headrooms: Ids) -> Ids:
        more = self.tables.row_length[rows].astype(np.int64) * PAGE_SIZE + 1
        return real(self, rows, generations, np.maximum(capacities, more), headrooms)

    patch.setattr(ManagerCore, "ensure_rows", ensure_rows)


def ensure_rows_of_any_generation(patch: Patch) -> None:
    real = ManagerCore.ensure_rows

    def ensure_rows(self: ManagerCore, rows: Ids, generations: U64, capacities: Ids, headrooms: Ids) -> Ids:
        return real(self, rows, self.tables.row_word[rows] >> np.uint64(32), capacities, headrooms)

    patch.setattr(ManagerCore, "ensure_rows", ensure_rows)


def fork_shares_the_tail_page(patch: Patch) -> None:
    """Up to the next page border, sealed or not."""
    real, find = ManagerCore.fork, core_module.find_parent

    def fork(
        self: ManagerCore, key: str, index: int, parent: int, generation: int, length: int, *wants: int
    ) -> Granted:
        def find_as_asked(tables: Tables, rows: Rows, source: Source, wanted: Fork) -> Row | None:
            return find(tables, rows, source, replace(wanted, length=length))

        patch.setattr(core_module, "find_parent", find_as_asked)
        return real(self, key, index, parent, generation, -(-length // PAGE_SIZE) * PAGE_SIZE, *wants)

    patch.setattr(ManagerCore, "fork", fork)


def fork_does_not_seal(patch: Patch) -> None:
    real_fork, real_seal = ManagerCore.fork, Sealer.seal
    forking = False

    def fork(self: ManagerCore, *arguments: int) -> Granted:
        nonlocal forking
        forking = True
        try:
            return real_fork(self, *arguments)  # type: ignore[arg-type]
        finally:
            forking = False

    def seal(self: Sealer, row: Row, source: Source) -> int:
        return 0 if forking else real_seal(self, row, source)

    patch.setattr(ManagerCore, "fork", fork)
    patch.setattr(Sealer, "seal", seal)


def pinned_pages_released(patch: Patch) -> None:
    real = Pins.set

    def set_pin(self: Pins, pin: Pin, prefix: Ids) -> None:
        before = self.pages
        real(self, pin, prefix)
        if self.pages != before:
            self._pages.release(prefix)

    patch.setattr(Pins, "set", set_pin)


def _repeat_the_first_copy(patch: Patch) -> None:
    """A manager that answers the copy that it has found at first, whatever has become of the page."""
    real = ManagerCore.ensure

    def ensure(self: ManagerCore, key: str, index: int, *wants: int) -> Granted:
        granted = real(self, key, index, *wants)
        found: dict[tuple[str, int, int], PageCopy] = vars(self.tables).setdefault("copies", {})
        place = key, index, granted.cached
        if granted.copy is not None:
            found.setdefault(place, granted.copy)
        return replace(granted, copy=found.get(place))

    patch.setattr(ManagerCore, "ensure", ensure)


def copy_of_a_page_that_was_reused(patch: Patch) -> None:
    """The executor does not look at the page's generation."""
    _repeat_the_first_copy(patch)
    patch.setattr(Executor, "_still_holds", lambda self, copy: True)


def progress_before_the_copy(patch: Patch) -> None:
    real = Executor._copy_slots

    def copy_slots(self: Executor, sequence: Running, start: int, copy: PageCopy) -> None:
        sequence.log.set_progress(start + copy.tokens, sequence.log.known)
        real(self, sequence, start, copy)

    patch.setattr(Executor, "_copy_slots", copy_slots)


MUTANTS: tuple[Callable[[Patch], None], ...] = (
    row_entry_before_page_word,
    generation_not_counted,
    page_sealed_early,
    page_freed_under_a_row,
    page_evicted_under_a_row,
    seal_word_before_contents,
    row_live_before_its_entries,
    length_before_entries,
    trim_of_computed_pages,
    salt_left_out,
    epoch_not_counted,
    a_repeated_ensure_makes_another_row,
    every_ensure_rows_grows,
    ensure_rows_of_any_generation,
    fork_shares_the_tail_page,
    fork_does_not_seal,
    pinned_pages_released,
    copy_of_a_page_that_was_reused,
    progress_before_the_copy,
)


def play_all() -> None:
    at_stores = (replace(SHORT[0], manager_deaths=frozenset((store,))) for store in range(_AT_STORES))
    at_random = (Schedule.drawn(seed) for seed in range(_RANDOM))
    # In turn: some faults need a death at one place, others much sharing.
    for schedule in chain.from_iterable(zip(at_stores, at_random, strict=False)):
        run(schedule)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_planted_fault_is_found(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    with pytest.raises(Violation) as found:
        play_all()
    # Not by crashing over it, but by an invariant that names it.
    assert ": Violation: " in str(found.value), found.value
    print(str(found.value).split(": Violation: ")[1])


def test_a_copy_is_safe_while_its_generation_is_looked_at(monkeypatch: Patch) -> None:
    _repeat_the_first_copy(monkeypatch)
    play_all()
