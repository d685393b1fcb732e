"""The shared bytes, the manager over them, and what must hold after every death."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from kvmanager.core import ManagerCore, Source
from kvmanager.layout import LOW32, NO_PAGE, PageState, RequestLog, Tables, state_of, usable_computed
from kvmanager.prefix import from_words
from tests.faults.simulator.faults import Countdown, DyingMemory, ManagerKilled
from tests.faults.simulator.model import PAGE_SIZE, Truth, Vector

Result = TypeVar("Result")


class Violation(Exception):
    """An invariant does not hold."""


class World:
    """Outlives the processes: tables, logs, records and the pool's K/V."""

    def __init__(self, truths: list[Truth], pages: int, rows: int, rng: random.Random, deaths: frozenset[int]) -> None:
        entries = -(-max(len(truth.tokens) for truth in truths) // PAGE_SIZE)
        self.tables = Tables(bytearray(Tables.nbytes(pages, rows, entries, PAGE_SIZE)), pages, rows, entries, PAGE_SIZE)
        self.truths = {truth.key: truth for truth in truths}
        self.half_open: dict[str, RequestLog] = {}  # logs whose record is not written yet
        self.records: dict[str, Source] = {}
        self.slots: dict[tuple[int, int], Vector] = {}  # (page, place) -> K/V
        self.fillers: dict[tuple[int, int], int] = {}  # (page, generation) -> the row generation that fills it
        self.rng = rng
        self.stores = Countdown(deaths)
        self.manager_deaths = 0
        self.lost_answers = 0
        self.answers = 0
        self.core = self._start_manager()

    def _start_manager(self) -> ManagerCore:
        return ManagerCore(self.tables, self.records.get, DyingMemory(self.stores, self.rng))

    def call(self, act: Callable[[ManagerCore], Result]) -> Result:
        """A call that is repeated until it is answered: the manager may die in it, or its answer get lost."""
        while True:
            try:
                result = act(self.core)
                lost = self.rng.random() < 0.05
                if lost:
                    self.lost_answers += 1
                    result = act(self.core)
            except ManagerKilled:
                self.manager_deaths += 1
                self.half_open.clear()  # adoption removes a log without its record
                self.core = self._start_manager()
                self.check()
                continue
            self.answers += 1
            if self.answers % 8 == 0:
                self.check()
            return result

    def open(self, key: str) -> None:
        """Log first, then the record: a death between the two leaves nothing."""
        truth = self.truths[key]

        def act(core: ManagerCore) -> None:
            if key not in self.records:
                self._may_die()
                buffer = bytearray(RequestLog.nbytes(1, len(truth.tokens), False))
                self.half_open[key] = RequestLog.create(buffer, 1, len(truth.tokens), truth.prompt, False)
                self._may_die()
                self.records[key] = Source(self.half_open.pop(key).outputs, truth.root)
                self._may_die()
            core.cached_tokens(truth.root, truth.prompt)

        self.call(act)

    def _may_die(self) -> None:
        if self.stores.due():
            raise ManagerKilled

    def check(self) -> None:
        """Tables, derived state, every row's K/V, every sealed page's K/V."""
        wrong = self.core.check_integrity()
        if wrong:
            raise Violation(wrong[0])
        for (key, index), row in self.core.live_rows.items():
            output = self.records[key].outputs[index]
            self._check_tokens(key, output.tokens[: output.known].tolist())
            computed = min(usable_computed(self.tables, row.number, output.computed), output.known)
            self.check_row(key, row.number, computed)
        self._check_sealed()

    def check_row(self, key: str, row: int, computed: int) -> None:
        """What attention would read for positions below `computed`."""
        expected = self.truths[key].vectors
        entries = self.tables.row_entry[row].tolist()
        for position in range(computed):
            word = entries[position // PAGE_SIZE]
            page = word & LOW32
            if page == NO_PAGE or word >> 32 != int(self.tables.page_word[page]) >> 32:
                raise Violation(f"{key} reads page {page} of another generation at position {position}")
            if self.slots.get((page, position % PAGE_SIZE)) != expected[position]:
                raise Violation(f"{key} reads foreign or unwritten K/V at position {position}, page {page}")

    def _check_tokens(self, key: str, tokens: list[int]) -> None:
        if tokens != self.truths[key].tokens[: len(tokens)]:
            raise Violation(f"{key} has other tokens than an undisturbed run")

    def _check_sealed(self) -> None:
        pages: dict[bytes, tuple[Vector, ...]] = {}
        for truth in self.truths.values():
            pages |= truth.pages
        for page in np.flatnonzero(self.tables.page_word & np.uint64(0xFF) == PageState.SEALED).tolist():
            content = from_words(self.tables.page_hash[page])
            held = tuple(self.slots.get((page, place), 0) for place in range(PAGE_SIZE))
            if pages.get(content) != held:
                raise Violation(f"page {page} is sealed over K/V that is not what its hash says")

    def write(self, row: int, row_generation: int, position: int, vector: Vector) -> None:
        """The executor's store of one position's K/V."""
        word = int(self.tables.row_entry[row, position // PAGE_SIZE])
        page, generation = word & LOW32, word >> 32
        page_word = int(self.tables.page_word[page])
        if state_of(page_word) != PageState.FILLING or page_word >> 32 != generation:
            raise Violation(f"position {position} is written into page {page}, which is not being filled by its row")
        if self.fillers.setdefault((page, generation), row_generation) != row_generation:
            raise Violation(f"two rows fill page {page} under one generation")
        self.slots[page, position % PAGE_SIZE] = vector

    def check_finished(self) -> None:
        """Every request came to its undisturbed end, and everything was given back."""
        for key, source in self.records.items():
            output = source.outputs[0]
            if not output.ended or output.known != len(self.truths[key].tokens):
                raise Violation(f"{key} never ended")
            self._check_tokens(key, output.tokens[: output.known].tolist())
        if len(self.records) != len(self.truths):
            raise Violation("a request was lost")
        self.check()
        if self.core.live_rows or self.core.pages.available != self.core.pages.usable:
            raise Violation("pages or rows leaked")
