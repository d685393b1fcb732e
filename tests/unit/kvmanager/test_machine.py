"""Any sequence of calls, restarts and lost memory leaves tables and derived state in agreement."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from kvmanager.core import Granted
from kvmanager.errors import Refusal, Refused
from kvmanager.layout import LOW32, PageState, generation_of, state_of, usable_computed
from kvmanager.pins import Pin
from kvmanager.rows import Row
from tests.unit.kvmanager.bench import PAGE_SIZE, Bench

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=20)


OUTPUTS = 3
Held = tuple[str, int, Granted]  # key, output, its row as it was granted


class Machine(RuleBasedStateMachine):
    """The test plays an executor that keeps the contract: it lowers `computed` before it closes."""

    open_rows = Bundle("open_rows")

    @initialize(pages=st.integers(3, 16), backed=st.integers(3, 20), prefix_cache=st.sampled_from((True, True, False)))
    def start(self, pages: int, backed: int, prefix_cache: bool) -> None:
        self.backed = backed
        self.prefix_cache = prefix_cache
        self.bench = Bench(pages=pages, rows=6, back=lambda page: min(page + 1, self.backed))
        self.bench.core.prefix_cache = prefix_cache
        self.opened = 0

    def live(self, held: Held) -> Row | None:
        key, index, granted = held
        row = self.bench.core.live_rows.get((key, index))
        return row if row is not None and row.generation == granted.generation else None

    @rule(
        target=open_rows,
        prompt=TOKENS,
        salt=st.sampled_from(("", "s")),
        pin=st.sampled_from(("", "", "one", "two")),
        need=st.integers(1, 28),
    )
    def make(self, prompt: list[int], salt: str, pin: str, need: int) -> Held:
        self.opened += 1
        key = self.bench.open(str(self.opened), prompt, max_tokens=12, outputs=OUTPUTS, salt=salt, pin=pin)
        before = self.bench.core.pages.available
        try:
            granted = self.bench.core.ensure(key, 0, need, 8, 0)
        except Refused as refused:
            assert refused.reason in (Refusal.NO_PAGES, Refusal.NO_ROWS, Refusal.TOO_LARGE)
            assert (key, 0) not in self.bench.core.live_rows
            assert self.bench.core.pages.available <= before
            return key, 0, Granted(0, 0, 0, 0)
        assert granted.capacity >= min(need, len(prompt) + 12)
        self._check_copy(key, 0, granted, len(prompt))
        return key, 0, granted

    def _check_copy(self, key: str, index: int, granted: Granted, known: int) -> None:
        """What is to be copied are this output's own tokens, and they go into a page of its own."""
        copy, tables, output = granted.copy, self.bench.tables, self.bench.output(key, index)
        assert granted.cached <= known
        if copy is None:
            return
        end = granted.cached + copy.tokens
        assert 0 < copy.tokens <= PAGE_SIZE and end <= known and granted.capacity > granted.cached
        word = int(tables.page_word[copy.page])
        assert generation_of(word) == copy.generation and state_of(word) != PageState.FREE
        if state_of(word) == PageState.SEALED:
            wanted = output.tokens[granted.cached : end].tolist()
            assert tables.page_tokens[copy.page, : copy.tokens].tolist() == wanted
        row = self.bench.core.live_rows[key, index]
        own = int(self.bench.core.rows.pages(row)[granted.cached // PAGE_SIZE])
        assert state_of(tables.page_word[own]) == PageState.FILLING and own != copy.page

    @rule(target=open_rows, parent=open_rows, index=st.integers(1, OUTPUTS - 1), cut=st.integers(0, 6))
    def fork(self, parent: Held, index: int, cut: int) -> Held:
        key, from_index, granted = parent
        row, source = self.live(parent), self.bench.sources[key]
        prompt = source.outputs[0].prompt_length
        computed = 0 if row is None else usable_computed(self.bench.tables, row.number, source.outputs[0].computed)
        length = max(min(computed, prompt) - cut, 0)
        taken = (key, index) in self.bench.core.live_rows
        if from_index or not length or not granted.generation or taken or source.outputs[index].computed:
            return key, index, Granted(0, 0, 0, 0)
        try:
            child = self.bench.core.fork(key, index, 0, granted.generation, length, length + 1, 4, 0)
        except Refused as refused:
            assert refused.reason in (Refusal.NO_PAGES, Refusal.NO_ROWS, Refusal.TOO_LARGE)
            return key, index, Granted(0, 0, 0, 0)
        assert child.cached == length // PAGE_SIZE * PAGE_SIZE
        assert (child.copy.tokens if child.copy else 0) == length % PAGE_SIZE
        self._check_copy(key, index, child, prompt)
        return key, index, child

    @rule(
        rows=st.lists(open_rows, max_size=4),
        more=st.lists(st.integers(0, 12), min_size=4, max_size=4),
        headroom=st.integers(0, 12),
    )
    def grow(self, rows: list[Held], more: list[int], headroom: int) -> None:
        named = {held[2].row: held for held in rows if held[2].generation}
        before = [row.length * PAGE_SIZE if (row := self.live(held)) else 0 for held in named.values()]
        wants = [(held[2], held[2].capacity + extra) for held, extra in zip(named.values(), more, strict=False)]
        found = self.bench.grow(wants, headroom)
        assert [capacity == 0 for capacity in found] == [capacity == 0 for capacity in before]
        assert all(now >= then for now, then in zip(found, before, strict=True))

    @rule(held=open_rows, steps=st.integers(1, 9))
    def compute(self, held: Held, steps: int) -> None:
        row, (key, index, _) = self.live(held), held
        if row is not None:
            output = self.bench.output(key, index)
            reached = min(max(output.computed, row.sealed * PAGE_SIZE) + steps, row.length * PAGE_SIZE, output.capacity)
            self.bench.compute(key, max(reached, output.computed), index)

    @rule(held=open_rows, capacity=st.integers(0, 30))
    def trim(self, held: Held, capacity: int) -> None:
        self.bench.core.trim(held[0], held[1], held[2].generation, capacity)

    @rule(held=consumes(open_rows), preempted=st.booleans(), twice=st.booleans())
    def close(self, held: Held, preempted: bool, twice: bool) -> None:
        key, index, granted = held
        if preempted and self.live(held) is not None:
            self.bench.output(key, index).set_progress(0, self.bench.output(key, index).known)
        for _ in range(1 + twice):
            self.bench.core.close(key, index, granted.generation)
        assert self.live(held) is None

    @rule(name=st.sampled_from(("one", "two")))
    def unpin(self, name: str) -> None:
        self.bench.core.unpin(Pin("tenant", name))
        assert all(found.pin.name != name for found in self.bench.core.pins.list())

    @rule()
    def seal(self) -> None:
        self.bench.core.seal_all()
        assert self.bench.core.seal_all() == 0

    @rule()
    def restart(self) -> None:
        pins = self.bench.core.pins.list()
        self.bench.restart()
        self.bench.core.prefix_cache = self.prefix_cache
        assert self.bench.core.pins.list() == pins

    @rule()
    def next_executor(self) -> None:
        self.bench.core.attach(self.opened.to_bytes(16, "big"))

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "bench"):
            assert self.bench.core.check_integrity() == []

    @invariant()
    def pages_are_counted(self) -> None:
        if hasattr(self, "bench"):
            core = self.bench.core
            named = [*core.live_rows.values(), *core.rows.pinned.values()]
            entries = [entry for row in named for entry in self._entries(row.number, row.length)]
            assert len(set(entries)) + core.pages.available == core.pages.usable
            assert all(0 < page < self.backed for page in entries)
            assert len(core.pins.pages) <= core.pins.most_pages or core.pages.usable < core.pages.count - 1

    def _entries(self, row: int, length: int) -> list[int]:
        return [word & LOW32 for word in self.bench.tables.row_entry[row, :length].tolist()]


Machine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much],
)
TestMachine = Machine.TestCase
