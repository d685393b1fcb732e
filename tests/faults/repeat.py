"""Managers that die between doing something and saying so, over and over, and what must be there each time.

after a death    every row that was answered, as it was; of what was not answered, each call at most
                 once; no page in two rows unless it is sealed; the epoch
after a repeat   exactly the rows, records and epoch that the answers name. What had happened before
                 the death is still that row, of that generation, with those pages
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from kvmanager.fsck import check_folder
from kvmanager.keys import request_key
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.statedir import StateDir
from tests.faults.batches import PAGE_SIZE, TENANT, Operation
from tests.faults.forge import Forge
from tests.faults.scripted import ManagerLost, ScriptedExecutor
from tests.faults.seen import Name, RowSeen, Seen, look, map_tables

_MOST_TURNS: Final = 2_000  # without a death: then the failpoint is never reached


@dataclass(slots=True)
class Tally:
    """What the kills hit, and how often the answer to a call that had happened already was compared.

    Fewer are compared than killed: a repeated call may be the next one that a manager dies behind.
    """

    kills: Counter[Operation] = field(default_factory=Counter)
    compared: Counter[Operation] = field(default_factory=Counter)
    turns: int = 0


class Repeat:
    """One state folder, its executor, and its managers one after the other."""

    def __init__(self, root: Path, seed: int) -> None:
        self._state = StateDir.prepare(root)
        self._chance = random.Random(seed)
        self._forge = Forge(self._state)
        self._executor = ScriptedExecutor(self._state, self._chance)
        # The first manager makes the pool, and ends by itself.
        self._forge.start("")
        self._executor.attach()
        self._tables = map_tables(self._state)
        self._answered = look(self._state, self._tables)
        self._happened: dict[Operation, Seen] = {}  # unanswered calls that a death came behind; what was seen then
        self._forge.kill()
        self.tally = Tally()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.close()
        self._forge.close()

    def kills(self, count: int) -> Iterator[Operation]:
        """As many deaths, of each operation alike. Raises AssertionError for what is lost or doubled."""
        operations = [operation for _ in range(-(-count // len(Operation))) for operation in Operation][:count]
        self._chance.shuffle(operations)
        for operation in operations:
            self._live(f"kvmanager.{operation.value}.after=kill", operation, _MOST_TURNS)
            self.tally.kills[operation] += 1
            yield operation
        self._live("", None, 10)

    def _live(self, failpoints: str, wanted: Operation | None, turns: int) -> None:
        """One manager: it dies at its first answer to the wanted operation, or without one at the end of its turns."""
        if wanted is Operation.ATTACH and self._chance.randrange(2):
            self._executor.become_another()
        self._forge.start(failpoints)
        try:
            self._attach()
            for _ in range(turns):
                self._turn()
        except ManagerLost:
            assert self._forge.wait() == -signal.SIGKILL
            assert wanted is not None
        else:
            assert wanted is None, f"no {wanted} in {turns} turns"
            self._forge.kill()
        self._check_files(wanted)

    def _attach(self) -> None:
        response = self._executor.attach()
        assert (response.epoch, response.pool_is_new) == (self._executor.epoch, False)
        while self._executor.unanswered:
            self._turn()
        assert not (wrong := self._executor.fsck()), wrong

    def _turn(self) -> None:
        """Then the files must say exactly what the answers say."""
        answered = self._executor.turn(self._tables)
        self.tally.turns += 1
        seen = look(self._state, self._tables)
        for name, row in self._answered.rows.items():
            now = seen.rows.get(name)
            assert now is None or now.generation != row.generation or _prolongs(row, now), f"pages of {name} changed"
        self._answered = seen
        assert seen.epoch == self._executor.epoch
        assert seen.records == self._executor.requests.keys()
        owned = {one.name: (one.row, one.generation, one.capacity) for one in self._executor.outputs if one.row >= 0}
        assert owned == {
            name: (row.row, row.generation, len(row.entries) * PAGE_SIZE) for name, row in seen.rows.items()
        }
        for call, reply in answered:
            operation = Operation(call.WhichOneof("call"))
            if (then := self._happened.pop(operation, None)) is not None:
                self.tally.compared[operation] += 1
                _check_repeated(call, reply, then, seen)

    def _check_files(self, wanted: Operation | None) -> None:
        """What a dead manager left. Nobody writes tables now."""
        seen, before, calls = look(self._state, self._tables), self._answered, self._executor.unanswered
        assert seen.epoch == self._executor.epoch
        assert not (wrong := check_folder(self._state).findings), wrong
        asked = {name for call in calls for name in _subjects(call, before)}
        for name, row in before.rows.items():
            assert name in asked or seen.rows.get(name) == row, f"the row of {name} is lost or changed"
        assert seen.rows.keys() <= before.rows.keys() | asked, "a row that nobody asked for"
        opened = {_key(call) for call in calls if call.HasField("open")}
        forgotten = {call.forget.key for call in calls if call.HasField("forget")}
        assert before.records - forgotten <= seen.records <= before.records | opened, "a record is lost or made up"
        for operation, then in self._happened.items():
            call = next(call for call in calls if call.HasField(operation.value))
            assert _about(call, then) == _about(call, seen), f"{call} happened twice"
        if wanted is not None and wanted is not Operation.ATTACH:
            self._happened.setdefault(wanted, seen)


def _check_repeated(call: kv.Call, reply: kv.Reply, then: Seen, now: Seen) -> None:
    """The call had happened when its manager died: then it was seen in the files, and that is how it is now."""
    assert not reply.HasField("error"), (call, reply)
    assert _about(call, then) == _about(call, now), f"repeating {call} changed something"
    match call.WhichOneof("call"):
        case "open":
            assert reply.open.existed and _key(call) in then.records
        case "forget":
            assert call.forget.key not in then.records | now.records
        case "ensure":
            assert then.rows[call.ensure.key, call.ensure.index].generation == reply.ensure.row_generation
        case "fork":
            assert then.rows[call.fork.key, call.fork.index].generation == reply.fork.row_generation
        case "ensure_rows":
            lengths = {row.row: len(row.entries) * PAGE_SIZE for row in then.rows.values()}
            assert [lengths[row] for row in call.ensure_rows.rows] == list(reply.ensure_rows.capacities)
        case "close":
            assert not _about(call, then), "closed, but there"


def _about(call: kv.Call, seen: Seen) -> dict[Name, RowSeen | None]:
    """The rows that the call may change, as they were seen. For `close` that is the one of its generation alone."""
    rows = {name: seen.rows.get(name) for name in _subjects(call, seen)}
    if call.HasField("close"):
        return {name: row for name, row in rows.items() if row and row.generation == call.close.row_generation}
    return rows


def _subjects(call: kv.Call, seen: Seen) -> set[Name]:
    """The outputs whose rows the call may change."""
    match call.WhichOneof("call"):
        case "ensure_rows":
            numbers = set(call.ensure_rows.rows)
            return {name for name, row in seen.rows.items() if row.row in numbers}
        case "ensure" | "fork" | "trim" | "close" as kind:
            about = getattr(call, kind)
            return {(about.key, about.index)}
    return set()


def _prolongs(old: RowSeen, new: RowSeen) -> bool:
    """A row grows or is cut at its end."""
    both = min(len(old.entries), len(new.entries))
    return old.row == new.row and old.entries[:both] == new.entries[:both]


def _key(call: kv.Call) -> str:
    return request_key(TENANT, call.open.record.request_id)
