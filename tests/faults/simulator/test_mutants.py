"""The simulator is worth what it finds: each planted fault must end in a Violation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from kvmanager.core import ManagerCore
from kvmanager.layout import U32, Header, PageState, RowState, entry, key_words, page_word, row_word
from kvmanager.memory import Memory
from kvmanager.pages import Ids, Pages
from kvmanager.prefix import Hash, to_words
from kvmanager.rows import Row, Rows
from tests.faults.simulator.schedule import Schedule, run
from tests.faults.simulator.test_simulator import SHORT, random_schedule
from tests.faults.simulator.world import Violation

Patch = pytest.MonkeyPatch


def row_entry_before_page_word(patch: Patch) -> None:
    """Reuse in the wrong order: the row names the next generation, then the page is invalidated."""
    late: dict[int, int] = {}

    def take(self: Pages, count: int) -> Ids:
        taken = np.array([self.free.pop() if self.free else self._evict() for _ in range(count)], np.int64)
        self.holders[taken] = 1
        late.clear()
        late.update({page: int(self.generations(taken)[i]) + 1 for i, page in enumerate(taken.tolist())})
        return taken

    def append(self: Rows, row: Row, pages: Ids, generations: np.ndarray) -> None:
        for number, page in enumerate(pages.tolist()):
            self._memory.put(self._tables.row_entry, (row.number, row.length + number), entry(page, late[page]))
        self._memory.put(self._tables.row_length, row.number, row.length + len(pages))
        row.length += len(pages)
        for page, generation in late.items():
            self._memory.put(self._tables.page_word, page, page_word(PageState.FILLING, generation))

    real_make = Rows.make

    def make(self: Rows, key: str, index: int, pages: Ids, generations: np.ndarray, sealed: int) -> Row:
        pairs = zip(pages.tolist(), generations.tolist(), strict=True)
        fresh = [late.get(page, generation) for page, generation in pairs]
        row = real_make(self, key, index, pages, np.array(fresh, np.uint64), sealed)
        for page, generation in late.items():
            self._memory.put(self._tables.page_word, page, page_word(PageState.FILLING, generation))
        return row

    patch.setattr(Pages, "take", take)
    patch.setattr(Rows, "append", append)
    patch.setattr(Rows, "make", make)


def generation_not_counted(patch: Patch) -> None:
    def take(self: Pages, count: int) -> Ids:
        taken = np.array([self.free.pop() if self.free else self._evict() for _ in range(count)], np.int64)
        self.holders[taken] = 1
        for page, generation in zip(taken.tolist(), self.generations(taken).tolist(), strict=True):
            self._memory.put(self._tables.page_word, page, page_word(PageState.FILLING, generation))
        return taken

    patch.setattr(Pages, "take", take)


def page_sealed_early(patch: Patch) -> None:
    """A page that is only partly computed counts as full."""
    real = ManagerCore._seal_row

    class Ahead:
        def __init__(self, output: object) -> None:
            self._output = output

        def __getattr__(self, name: str) -> object:
            if name == "computed":
                return min(self._output.computed + 1, self._output.known)  # type: ignore[attr-defined]
            return getattr(self._output, name)

    def seal_row(self: ManagerCore, row: Row, source: object) -> int:
        outputs = [Ahead(output) for output in source.outputs]  # type: ignore[attr-defined]
        return real(self, row, replace(source, outputs=outputs))  # type: ignore[type-var]

    patch.setattr(ManagerCore, "_seal_row", seal_row)


def page_freed_under_a_row(patch: Patch) -> None:
    """A shared page is given back by the first row that closes."""
    real = Pages.release

    def release(self: Pages, pages: Ids) -> None:
        shared = pages[self.holders[pages] > 1]
        real(self, pages)
        self.free.extend(shared.tolist())

    patch.setattr(Pages, "release", release)


def seal_word_before_contents(patch: Patch) -> None:
    def seal(self: Pages, page: int, content: Hash, parent: Hash, tokens: U32) -> None:
        tables, put = self._tables, self._memory.put
        generation = int(tables.page_word[page]) >> 32
        put(tables.page_word, page, page_word(PageState.SEALED, generation))
        put(tables.page_hash, page, to_words(content))
        put(tables.page_parent, page, to_words(parent))
        put(tables.page_tokens, page, tokens)
        self.index.add(content, page)

    patch.setattr(Pages, "seal", seal)


def row_live_before_its_entries(patch: Patch) -> None:
    def make(self: Rows, key: str, index: int, pages: Ids, generations: np.ndarray, sealed: int) -> Row:
        tables, put, number = self._tables, self._memory.put, self.free.pop()
        self.newest += 1
        put(tables.row_key, number, key_words(key))
        put(tables.row_length, number, len(pages))
        put(tables.row_word, number, row_word(RowState.LIVE, index, self.newest))
        entries = pages.astype(np.uint64) | generations << np.uint64(32)
        put(tables.row_entry, (number, slice(0, len(pages))), entries)
        row = self.live[key, index] = Row(number, key, index, self.newest, len(pages), sealed)
        return row

    patch.setattr(Rows, "make", make)


def length_before_entries(patch: Patch) -> None:
    def append(self: Rows, row: Row, pages: Ids, generations: np.ndarray) -> None:
        start, row.length = row.length, row.length + len(pages)
        self._memory.put(self._tables.row_length, row.number, row.length)
        entries = pages.astype(np.uint64) | generations << np.uint64(32)
        self._memory.put(self._tables.row_entry, (row.number, slice(start, row.length)), entries)

    patch.setattr(Rows, "append", append)


def trim_of_computed_pages(patch: Patch) -> None:
    def trim(self: ManagerCore, key: str, index: int, generation: int, capacity: int) -> None:
        row = self._current(key, index, generation)
        if row is not None and row.length > 1:
            dropped = self.rows.pages(row, row.length - 1)
            self.rows.shrink(row, row.length - 1)
            self.pages.release(dropped)

    patch.setattr(ManagerCore, "trim", trim)


def salt_left_out(patch: Patch) -> None:
    """Prefixes are matched from one root, whoever asks."""
    real = ManagerCore._match

    def match(self: ManagerCore, root: Hash, tokens: U32) -> Ids:
        return next((found for other in ROOTS if len(found := real(self, other, tokens))), real(self, root, tokens))

    from kvmanager.prefix import root_hash

    ROOTS = [root_hash("model", "tenant", salt) for salt in ("salt", "")]
    patch.setattr(ManagerCore, "_match", match)


def epoch_not_counted(patch: Patch) -> None:
    def attach(self: ManagerCore, executor_id: bytes) -> int:
        own = slice(Header.EXECUTOR_ID, Header.EXECUTOR_ID + 2)
        Memory().put(self.tables.header, own, np.frombuffer(executor_id, np.uint64))
        return self.epoch

    patch.setattr(ManagerCore, "attach", attach)


def a_repeated_first_ensure_makes_another_row(patch: Patch) -> None:
    real = ManagerCore.ensure

    def ensure(self: ManagerCore, key: str, index: int, generation: int, *wants: int) -> object:
        if generation == 0:
            self.rows.live.pop((key, index), None)
        return real(self, key, index, generation, *wants)

    patch.setattr(ManagerCore, "ensure", ensure)


MUTANTS: tuple[Callable[[Patch], None], ...] = (
    row_entry_before_page_word,
    generation_not_counted,
    page_sealed_early,
    page_freed_under_a_row,
    seal_word_before_contents,
    row_live_before_its_entries,
    length_before_entries,
    trim_of_computed_pages,
    salt_left_out,
    epoch_not_counted,
    a_repeated_first_ensure_makes_another_row,
)


def play_all(schedules: Iterable[Schedule]) -> None:
    for schedule in schedules:
        run(schedule)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_planted_fault_is_found(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    at_every_store = (replace(SHORT[0], manager_deaths=frozenset((store,))) for store in range(120))
    at_random = (random_schedule(seed) for seed in range(60))
    with pytest.raises(Violation) as found:
        play_all(chain(at_every_store, at_random))
    # Not by crashing over it, but by an invariant that names it.
    assert ": Violation: " in str(found.value), found.value
