"""The shared bytes, the manager over them, and the calls that cross its deaths."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from kvmanager.core import ManagerCore
from kvmanager.errors import Refused
from kvmanager.layout import OutputLog, RequestLog, Tables
from kvmanager.prefix import Hash
from kvmanager.room import check_room
from kvmanager.source import Source
from tests.faults.simulator.faults import Countdown, DyingMemory, ManagerKilled
from tests.faults.simulator.invariants import Pool
from tests.faults.simulator.model import OutputTruth, Vector
from tests.faults.simulator.stores.requests import PAGE_SIZE, Planned

_LOST = 0.05  # of the turns of the stream: it breaks although both ends live

Answer = object  # what a call returns, or the Refused that it raised
Act = Callable[[ManagerCore], Answer]


class World:
    """Outlives the processes: tables, logs, records and the pool's K/V."""

    def __init__(
        self,
        requests: list[Planned],
        pages: int,
        rows: int,
        rng: random.Random,
        deaths: frozenset[int],
        prefix_cache: bool,
    ) -> None:
        """pages: with the reserved one."""
        entries = -(-max(request.capacity for request in requests) // PAGE_SIZE)
        self.tables = Tables(bytearray(Tables.nbytes(pages, rows, entries, PAGE_SIZE)), pages, rows, entries, PAGE_SIZE)
        self.requests = {request.truth.key: request for request in requests}
        content: dict[Hash, tuple[Vector, ...]] = {}
        for request in requests:
            content |= request.truth.pages
        self.pool = Pool(self.tables, content)
        self.half_open: dict[str, RequestLog] = {}  # logs whose record is not written yet
        self.records: dict[str, Source] = {}
        self.refused: set[str] = set()  # keys that never got a record
        self.ended: dict[str, list[OutputLog]] = {}  # of records that are forgotten
        self.rng = rng
        self.stores = Countdown(deaths)
        self.prefix_cache = prefix_cache
        self.manager_deaths = 0
        self.broken_streams = 0
        self.answers = 0
        self.on_death: Callable[[], None] = lambda: None
        self.core = self._start_manager()

    def _start_manager(self) -> ManagerCore:
        core = ManagerCore(self.tables, self.records.get, DyingMemory(self.stores, self.rng))
        core.prefix_cache = self.prefix_cache
        return core

    def truth(self, key: str, index: int) -> OutputTruth:
        return self.requests[key].truth.outputs[index]

    # --- calls ---

    def exchange(self, acts: Sequence[Act]) -> list[Answer]:
        """Answers in order. Where the stream breaks, all that has no answer goes out again on the next."""
        answers: list[Answer] = []
        while len(answers) < len(acts):
            given: list[Answer] = []
            broken = False
            try:
                for act in acts[len(answers) :]:
                    given.append(self._answer(act))  # noqa: PERF401  # what was answered before a death stays
                broken = self.rng.random() < _LOST
            except ManagerKilled:
                broken = True
                self._restart()
            if broken:
                # Some of the answers were on their way, and are lost or not.
                given = given[: self.rng.randint(0, len(given))]
                self.broken_streams += 1
            answers += given
        return answers

    def call(self, act: Act) -> Answer:
        return self.exchange([act])[0]

    def _answer(self, act: Act) -> Answer:
        self.answers += 1
        try:
            return act(self.core)
        except Refused as refused:
            return refused

    def _restart(self) -> None:
        self.manager_deaths += 1
        self.half_open.clear()  # adoption removes a log without its record
        self.core = self._start_manager()
        self.on_death()

    def open(self, key: str) -> bool:
        """Log first, then the record: a death between the two leaves nothing. False: there is no room for it."""
        request = self.requests[key]
        truth, capacity, outputs = request.truth, request.capacity, len(request.truth.outputs)

        def act(core: ManagerCore) -> None:
            if key not in self.records:
                unfinished = [record for record in self.records.values() if not all(o.ended for o in record.outputs)]
                check_room(core, unfinished, Source([], truth.root, request.pin), truth.prompt, capacity - 1)
                self._may_die()
                buffer = bytearray(RequestLog.nbytes(outputs, capacity, False))
                self.half_open[key] = RequestLog.create(buffer, outputs, capacity, truth.prompt, False)
                self._may_die()
                self.records[key] = Source(self.half_open.pop(key).outputs, truth.root, request.pin)
                self._may_die()
            core.cached_tokens(truth.root, truth.prompt)

        refused = isinstance(self.call(act), Refused)
        if refused:
            self.refused.add(key)
        return not refused

    def forget(self, key: str) -> None:
        """Drops a record that has ended and has no rows."""

        def act(core: ManagerCore) -> None:
            record = self.records.get(key)
            if record is not None and not core.has_rows(key):
                self._may_die()
                self.ended[key] = record.outputs
                del self.records[key]
                self._may_die()

        self.call(act)

    def _may_die(self) -> None:
        if self.stores.due():
            raise ManagerKilled
