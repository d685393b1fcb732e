"""A core over plain bytes, with logs that the test writes as an executor would."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvmanager.core import Granted, ManagerCore
from kvmanager.keys import request_key
from kvmanager.layout import OutputLog, RequestLog, Tables
from kvmanager.pins import Pin
from kvmanager.prefix import root_hash
from kvmanager.source import Source

PAGE_SIZE = 4


class Bench:
    """`pages` are usable pages: page 0 comes on top."""

    def __init__(
        self, pages: int = 20, rows: int = 6, entries: int = 16, back: Callable[[int], int] = lambda page: page + 1
    ) -> None:
        size = Tables.nbytes(pages + 1, rows, entries, PAGE_SIZE)
        self.tables = Tables(bytearray(size), pages + 1, rows, entries, PAGE_SIZE)
        self.sources: dict[str, Source] = {}
        self.back = back
        self.core = self.restart()

    def restart(self) -> ManagerCore:
        """What the next manager makes of the same bytes."""
        self.core = ManagerCore(self.tables, self.sources.get, back=self.back)
        return self.core

    def open(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int = 40,
        outputs: int = 1,
        salt: str = "",
        pin: str = "",
    ) -> str:
        key = request_key("tenant", name)
        capacity = len(prompt) + max_tokens
        buffer = bytearray(RequestLog.nbytes(outputs, capacity, False))
        log = RequestLog.create(buffer, outputs, capacity, np.array(prompt, np.uint32), False)
        reserved = Pin("tenant", pin) if pin else None
        self.sources[key] = Source(log.outputs, root_hash("model", "tenant", salt), reserved)
        return key

    def output(self, key: str, index: int = 0) -> OutputLog:
        return self.sources[key].outputs[index]

    def ensure(self, key: str, capacity: int, headroom: int = 0, keep_free: int = 0, index: int = 0) -> Granted:
        granted = self.core.ensure(key, index, capacity, headroom, keep_free)
        assert self.core.check_integrity() == []
        return granted

    def fork(self, key: str, index: int, parent: Granted, length: int, capacity: int, headroom: int = 0) -> Granted:
        """From output 0."""
        granted = self.core.fork(key, index, 0, parent.generation, length, capacity, headroom, 0)
        assert self.core.check_integrity() == []
        return granted

    def grow(self, wants: list[tuple[Granted, int]], headroom: int = 0) -> list[int]:
        """wants: rows and the tokens that each is to hold. Returns what each holds then."""
        rows = np.array([granted.row for granted, _ in wants], np.int64)
        generations = np.array([granted.generation for granted, _ in wants], np.uint64)
        capacities = np.array([capacity for _, capacity in wants], np.int64)
        found = self.core.ensure_rows(rows, generations, capacities, np.full(len(wants), headroom))
        assert self.core.check_integrity() == []
        return [int(capacity) for capacity in found]

    def close(self, key: str, generation: int, index: int = 0) -> None:
        self.core.close(key, index, generation)
        assert self.core.check_integrity() == []

    def compute(self, key: str, computed: int, index: int = 0) -> None:
        """The executor has written K/V of positions below `computed`."""
        output = self.output(key, index)
        output.set_progress(computed, max(output.known, computed))

    def fill(self, name: str, prompt: list[int], salt: str = "") -> str:
        """A request that came, was computed and went: its full pages are cached."""
        key = self.open(name, prompt, salt=salt)
        granted = self.ensure(key, len(prompt))
        self.compute(key, len(prompt))
        self.close(key, granted.generation)
        return key

    def row_pages(self, granted: Granted) -> list[int]:
        length = int(self.tables.row_length[granted.row])
        return (self.tables.row_entry[granted.row, :length] & np.uint64(0xFFFFFFFF)).astype(int).tolist()
