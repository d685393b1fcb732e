"""Any sequence of calls, restarts and lost memory leaves tables and derived state in agreement."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from kvmanager.errors import Refusal, Refused
from kvmanager.layout import LOW32
from tests.unit.kvmanager.bench import PAGE_SIZE, Bench

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=20)


class Machine(RuleBasedStateMachine):
    """The test plays an executor that keeps the contract: it lowers `computed` before it closes."""

    open_rows = Bundle("open_rows")

    @initialize(pages=st.integers(3, 16), backed=st.integers(3, 20))
    def start(self, pages: int, backed: int) -> None:
        self.backed = backed
        self.bench = Bench(pages=pages, rows=4, back=lambda page: min(page + 1, self.backed))
        self.opened = 0
        self.capacity: dict[str, int] = {}

    @rule(target=open_rows, prompt=TOKENS, salt=st.sampled_from(("", "s")), need=st.integers(1, 28))
    def make(self, prompt: list[int], salt: str, need: int) -> tuple[str, int]:
        self.opened += 1
        key = self.bench.open(str(self.opened), prompt, max_tokens=12, salt=salt)
        before = self.bench.core.pages.available
        try:
            granted = self.bench.core.ensure(key, 0, 0, need, 8, 0)
        except Refused as refused:
            reason = refused.reason
            assert reason in (Refusal.NO_PAGES, Refusal.NO_ROWS, Refusal.TOO_LARGE)
            assert (key, 0) not in self.bench.core.live_rows
            assert self.bench.core.pages.available <= before
            return key, 0
        assert granted.capacity >= min(need, len(prompt) + 12)
        assert granted.cached <= len(prompt)
        return key, granted.generation

    @rule(row=open_rows, more=st.integers(0, 12), headroom=st.integers(0, 12), keep_free=st.integers(0, 3))
    def grow(self, row: tuple[str, int], more: int, headroom: int, keep_free: int) -> None:
        key, generation = row
        live = self.bench.core.live_rows.get((key, 0))
        if not generation or live is None:
            return
        before = live.length * PAGE_SIZE
        try:
            granted = self.bench.core.ensure(key, 0, generation, before + more, headroom, keep_free)
        except Refused:
            assert live.length * PAGE_SIZE == before
            return
        assert granted.capacity >= before

    @rule(row=open_rows, steps=st.integers(1, 9))
    def compute(self, row: tuple[str, int], steps: int) -> None:
        key, generation = row
        live = self.bench.core.live_rows.get((key, 0))
        if generation and live is not None:
            output = self.bench.output(key)
            reached = min(
                max(output.computed, live.sealed * PAGE_SIZE) + steps, live.length * PAGE_SIZE, output.capacity
            )
            self.bench.compute(key, max(reached, output.computed))

    @rule(row=open_rows, capacity=st.integers(0, 30))
    def trim(self, row: tuple[str, int], capacity: int) -> None:
        self.bench.core.trim(row[0], 0, row[1], capacity)

    @rule(row=consumes(open_rows), preempted=st.booleans(), twice=st.booleans())
    def close(self, row: tuple[str, int], preempted: bool, twice: bool) -> None:
        key, generation = row
        if preempted:
            self.bench.output(key).set_progress(0, self.bench.output(key).known)
        for _ in range(1 + twice):
            self.bench.core.close(key, 0, generation)
        assert generation == 0 or (key, 0) not in self.bench.core.live_rows

    @rule()
    def seal(self) -> None:
        self.bench.core.seal_all()
        assert self.bench.core.seal_all() == 0

    @rule()
    def restart(self) -> None:
        self.bench.restart()

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
            entries = [entry for row in core.live_rows.values() for entry in self._entries(row.number, row.length)]
            assert len(set(entries)) + core.pages.available == core.pages.usable
            assert all(0 < page < self.backed for page in entries)

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
