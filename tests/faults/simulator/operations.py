"""Random calls of the manager's core, restarts among them; after every one of them everything is checked.

No K/V and no deaths inside a call: what counts here is the number of states that are met.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvmanager.core import Granted, ManagerCore
from kvmanager.errors import Refusal, Refused
from kvmanager.keys import request_key
from kvmanager.layout import OutputLog, RequestLog, Tables
from kvmanager.pins import Pin
from kvmanager.prefix import root_hash
from kvmanager.source import Source
from tests.faults.simulator.faults import Violation

_PAGE_SIZE = 4
_ENTRIES = 7
_VOCABULARY = 2
_LONGEST = 16  # tokens of a prompt
_MOST_TOKENS = 10  # of an answer
_MOST_RECORDS = 7
_FULL = (Refusal.NO_PAGES, Refusal.NO_ROWS, Refusal.TOO_LARGE)
_ROOTS = tuple(root_hash("model", "tenant", salt) for salt in ("", "", "salt"))
_PINS = (None, None, None, Pin("tenant", "one"), Pin("tenant", "two"))

Trace = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Replayed, it is the same."""

    operations: int
    refused: int
    forks: int
    hit_tokens: int
    restarts: int
    live_rows: int  # summed over all operations: how much there was to check


class Operations:
    """The driver plays an executor that keeps the contract: it lowers `computed` before it gives a row up."""

    def __init__(self, seed: int, trace: Trace | None = None) -> None:
        rng = self._rng = random.Random(f"operations {seed}")
        self._trace = trace
        pages, rows = rng.randint(4, 24), rng.randint(2, 6)
        self._backed = pages + 1 if rng.random() < 0.8 else rng.randint(3, pages + 1)
        size = Tables.nbytes(pages + 1, rows, _ENTRIES, _PAGE_SIZE)
        self._tables = Tables(bytearray(size), pages + 1, rows, _ENTRIES, _PAGE_SIZE)
        self._records: dict[str, Source] = {}
        self._opened = 0
        self._attached = 0
        self._prefix_cache = rng.random() < 0.9
        self._old: list[tuple[str, int, int, int]] = []  # key, index, row, generation: of rows that are gone
        self._forked: dict[tuple[str, int], tuple[int, int]] = {}  # row generation and length
        self._counts: Counter[str] = Counter()
        self._hits = 0
        self._core = self._restarted()
        operations = {
            self._open: 6,
            self._ensure: 18,
            self._fork: 12,
            self._grow: 10,
            self._compute: 24,
            self._trim: 5,
            self._close: 7,
            self._forget: 4,
            self._seal: 6,
            self._unpin: 2,
            self._attach: 1,
            self._restart: 2,
        }
        self._operations, self._weights = list(operations), list(operations.values())

    def run(self, count: int) -> Outcome:
        """Raises Violation naming the operation."""
        live = 0
        for number, operation in enumerate(self._rng.choices(self._operations, self._weights, k=count)):
            if self._trace is not None:
                self._trace(f"{number} {operation.__name__.strip('_')}")
            operation()
            if wrong := self._core.check_integrity():
                raise Violation(f"after operation {number}, {operation.__name__.strip('_')}: {wrong[0]}")
            live += len(self._core.live_rows)
        self._hits += self._core.hit_tokens
        counts = self._counts
        return Outcome(count, counts["refused"], counts["forks"], self._hits, counts["restarts"], live)

    # --- what there is ---

    def _restarted(self) -> ManagerCore:
        core = ManagerCore(self._tables, self._records.get, back=lambda page: min(page + 1, self._backed))
        core.prefix_cache = self._prefix_cache
        return core

    def _live(self) -> tuple[str, int] | None:
        """An output with a row."""
        rows = self._core.live_rows
        return self._rng.choice(list(rows)) if rows else None

    def _output(self, key: str, index: int) -> OutputLog:
        return self._records[key].outputs[index]

    def _lower(self, key: str, index: int) -> None:
        output = self._output(key, index)
        output.set_progress(0, output.known)

    def _check_granted(self, granted: Granted, key: str, index: int, need: int) -> None:
        output = self._output(key, index)
        row = self._core.live_rows.get((key, index))
        if row is None or (row.number, row.generation) != (granted.row, granted.generation):
            raise Violation(f"granted {granted}, which is no row of the output")
        if granted.capacity < min(need, output.capacity) or granted.cached > output.known:
            raise Violation(f"granted {granted} for {need} tokens")
        if granted.copy is not None and granted.cached + granted.copy.tokens > output.known:
            raise Violation(f"more is to be copied than is known: {granted}")

    def _check_refused(self, refused: Refused, key: str, index: int) -> None:
        self._counts["refused"] += 1
        if refused.reason not in _FULL or (key, index) in self._core.live_rows:
            raise Violation(f"refused, and yet something has changed: {refused}")

    # --- operations ---

    def _open(self) -> None:
        if len(self._records) >= _MOST_RECORDS:
            return
        rng = self._rng
        self._opened += 1
        prompt = np.array([rng.randrange(_VOCABULARY) for _ in range(rng.randint(1, _LONGEST))], np.uint32)
        capacity, outputs = len(prompt) + rng.randint(1, _MOST_TOKENS), rng.choice((1, 2, 2, 3))
        log = RequestLog.create(
            bytearray(RequestLog.nbytes(outputs, capacity, False)), outputs, capacity, prompt, False
        )
        key = request_key("tenant", str(self._opened))
        self._records[key] = Source(log.outputs, rng.choice(_ROOTS), rng.choice(_PINS))

    def _ensure(self) -> None:
        if not self._records:
            return
        rng, key = self._rng, self._rng.choice(list(self._records))
        index, need = rng.randrange(len(self._records[key].outputs)), rng.randint(1, 20)
        if (key, index) in self._core.live_rows:
            need = 0  # answered as it is
        try:
            granted = self._core.ensure(key, index, need, rng.choice((0, 4, 8)), rng.choice((0, 0, 0, 1, 3)))
        except Refused as refused:
            self._check_refused(refused, key, index)
        else:
            self._check_granted(granted, key, index, need)

    def _fork(self) -> None:
        found = self._live()
        if found is None:
            return
        rng, core, (key, parent) = self._rng, self._core, found
        index = (parent + 1) % len(self._records[key].outputs)
        theirs, ours = self._output(key, parent), self._output(key, index)
        row, there = core.live_rows[key, parent], core.live_rows.get((key, index))
        common = min(theirs.computed, ours.known)
        same = theirs.tokens[:common] == ours.tokens[:common]
        length = rng.randint(0, common if same.all() else int(same.argmin()))
        if there is not None:
            # Repeated as it was: the answer was lost.
            generation, length = self._forked.get((key, index), (0, 0))
            length = length if there.generation == generation else 0
        if index == parent or not 0 < length <= common:
            return
        generation = row.generation if rng.random() < 0.9 else row.generation - 1
        need = length + 1 if there is None else 0
        wants = (need, rng.choice((0, 4)), rng.choice((0, 0, 1)))
        try:
            granted = core.fork(key, index, parent, generation, length, *wants)
        except Refused as refused:
            self._check_refused(refused, key, index)
            return
        if generation == row.generation or there is not None:
            self._check_granted(granted, key, index, need)
            self._forked[key, index] = (granted.generation, length)
            self._counts["forks"] += there is None
        elif granted.generation:
            raise Violation("a row that is gone was forked")

    def _grow(self) -> None:
        rng, core = self._rng, self._core
        rows = [row for row in core.live_rows.values() if rng.random() < 0.7]
        numbers = {row.number for row in rows}
        old = {row: generation for _, _, row, generation in self._old[-3:] if row not in numbers}
        if not rows and not old:
            return
        wanted = [rng.randint(1, _ENTRIES * _PAGE_SIZE) for _ in range(len(rows) + len(old))]
        extra = [rng.choice((0, 4, 8)) for _ in wanted]
        generations = [*(row.generation for row in rows), *old.values()]
        before = [row.length * _PAGE_SIZE for row in rows]
        held = core.ensure_rows(
            np.array([*(row.number for row in rows), *old], np.int64),
            np.array(generations, np.uint64),
            np.array(wanted, np.int64),
            np.array(extra, np.int64),
        ).tolist()
        for there, now, want, more in zip(before, held, wanted, extra, strict=False):
            most = -(-(want + more) // _PAGE_SIZE) * _PAGE_SIZE
            if not there <= now <= max(there, most):
                raise Violation(f"a row of {there} tokens holds {now} after {want} and {more} more were asked for")
        if any(held[len(rows) :]):
            raise Violation("a row that is gone has grown")

    def _compute(self) -> None:
        found = self._live()
        if found is None:
            return
        row, output = self._core.live_rows[found], self._output(*found)
        start = max(output.computed, row.sealed * _PAGE_SIZE)
        reached = max(min(start + self._rng.randint(1, 9), row.length * _PAGE_SIZE, output.capacity), output.computed)
        for position in range(output.known, reached):
            output.tokens[position] = self._rng.randrange(_VOCABULARY)
        output.set_progress(reached, max(output.known, reached))

    def _trim(self) -> None:
        found = self._live()
        if found is not None:
            self._core.trim(*found, self._core.live_rows[found].generation, self._rng.randint(0, 28))

    def _close(self) -> None:
        found = self._live()
        if found is None:
            return
        row = self._core.live_rows[found]
        if self._rng.random() < 0.5:
            self._lower(*found)  # preempted: what is full already is not sealed any more
        for _ in range(self._rng.choice((1, 1, 2))):
            self._core.close(*found, row.generation)
        self._lower(*found)
        self._old.append((*found, row.number, row.generation))
        if found in self._core.live_rows:
            raise Violation("a row was closed, and is there")

    def _forget(self) -> None:
        keys = [key for key in self._records if not self._core.has_rows(key)]
        if keys:
            del self._records[self._rng.choice(keys)]

    def _seal(self) -> None:
        self._core.seal_all()
        if self._core.seal_all():
            raise Violation("there was more to seal")

    def _unpin(self) -> None:
        pin = self._rng.choice(_PINS)
        if pin is not None:
            self._core.unpin(pin)

    def _attach(self) -> None:
        epoch = self._core.epoch
        self._attached += 1
        for _ in range(2):
            if self._core.attach(self._attached.to_bytes(16, "little")) != epoch + 1:
                raise Violation("an executor was given another epoch than the next")

    def _restart(self) -> None:
        self._counts["restarts"] += 1
        self._hits += self._core.hit_tokens
        self._core = self._restarted()


def run(seed: int, count: int, trace: Trace | None = None) -> Outcome:
    """Raises Violation naming the seed: running that again fails the same way."""
    try:
        return Operations(seed, trace).run(count)
    except Exception as error:
        raise Violation(f"operations of seed {seed}: {type(error).__name__}: {error}") from error
