"""Real files: what a kill leaves is clean; what is planted in them is found, repaired, and adopted by a manager."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvmanager import pool as pools
from kvmanager.findings import FindingKind
from kvmanager.fsck import Report, check_folder
from kvmanager.layout import Header, PageState, RequestLog, RowState, Tables, page_word, row_word
from kvmanager.pool import CannotAdopt
from kvmanager.repair import repair
from kvmanager.service import Manager
from kvmanager.vacant import Holder, InUse, discard, vacant
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.lock import FileLock
from pagehold.runtime.statedir import StateDir
from pagehold.v1 import inference_pb2 as api
from tests.unit.kvmanager.files import (
    attached,
    close_call,
    ensure_call,
    executor_log,
    key_of,
    manager_of,
    open_call,
)


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    """Rows over a shared prefix, cached pages, a pinned prefix: as a kill leaves them."""
    state = StateDir.prepare(tmp_path / "s")
    manager = attached(state)
    pinning = api.GenerateRequest(pin_prefix="system", cache_salt="other").SerializeToString()
    for name, fields in (("a", {}), ("b", {}), ("pinned", {"request": pinning})):
        assert manager.call(open_call(name, **fields)).HasField("open")
        granted = manager.call(ensure_call(name, 60)).ensure
        executor_log(state.records, name)[0].set_progress(40, 40)
        manager.sweep()
        if name == "pinned":
            assert manager.call(close_call(name, granted.row_generation)).HasField("close")
    assert [one.pin.name for one in manager.pins()] == ["system"]
    return state


class Files:
    """The folder's tables and logs, to be damaged."""

    def __init__(self, state: StateDir) -> None:
        self.state = state
        pool = pools.examine(state, writable=True)
        assert pool is not None
        self.tables: Tables = pool.tables
        live = np.flatnonzero(self.tables.row_word & np.uint64(0xFF) == RowState.LIVE).tolist()
        keys = [self.tables.row_key[row].tobytes().hex() for row in live]
        self.row = live[keys.index(key_of("a"))]
        self.other = live[keys.index(key_of("b"))]

    def path(self, name: str, suffix: str) -> Path:
        return self.state.records / f"{key_of(name)}{suffix}"

    def page(self, place: int, row: int | None = None) -> int:
        return int(self.tables.row_entry[self.row if row is None else row, place]) & 0xFFFFFFFF

    def log(self) -> RequestLog:
        return RequestLog(memoryview(np.memmap(self.path("a", ".log"), np.uint8, "r+")))

    def rewrite(self, **fields: object) -> None:
        record = kv.RequestRecord.FromString(self.path("a", ".req").read_bytes())
        record.MergeFrom(kv.RequestRecord(**fields))  # type: ignore[arg-type]
        self.path("a", ".req").write_bytes(record.SerializeToString())


def lend_page(files: Files) -> None:
    """The page that one row fills, in another one too."""
    files.tables.row_entry[files.row, 2] = files.tables.row_entry[files.other, 2]


def corrupt_tokens(files: Files) -> None:
    files.tables.page_tokens[files.page(0), 3] += 1


def free_held_page(files: Files) -> None:
    word = int(files.tables.page_word[files.page(2)])
    files.tables.page_word[files.page(2)] = page_word(PageState.FREE, word >> 32)


def shift_generation(files: Files) -> None:
    files.tables.row_entry[files.row, 2] += 1 << 32


def break_pin(files: Files) -> None:
    row = int(np.flatnonzero(files.tables.row_word & np.uint64(0xFF) == RowState.PINNED)[0])
    files.tables.row_entry[row, 1] = files.tables.row_entry[files.row, 2]


def lose_record(files: Files) -> None:
    for suffix in (".req", ".log"):
        files.path("a", suffix).unlink()


def lengthen(files: Files) -> None:
    files.tables.row_length[files.row] = 1 << 50


def make_twin(files: Files) -> None:
    files.tables.row_key[files.row] = files.tables.row_key[files.other]


def unknown_row(files: Files) -> None:
    files.tables.row_word[7] = 0xFF


def unknown_page(files: Files) -> None:
    files.tables.page_word[30] = 0xEE


def contradict(files: Files) -> None:
    files.log().outputs[0].words[0] = 50 | 40 << 32


def change_prompt(files: Files) -> None:
    files.log().outputs[0].tokens[5] = 1


def change_computed(files: Files) -> None:
    files.log().outputs[0].set_progress(60, 60)
    files.tables.row_length[files.row] = 3


DAMAGE: list[tuple[Callable[[Files], object], FindingKind]] = [
    (lend_page, FindingKind.DOUBLE_OWNED),
    (corrupt_tokens, FindingKind.CONTENTS),
    (free_held_page, FindingKind.STALE),
    (shift_generation, FindingKind.STALE),
    (break_pin, FindingKind.PIN),
    (lose_record, FindingKind.LEAKED),
    (lengthen, FindingKind.ROW),
    (make_twin, FindingKind.ROW),
    (unknown_row, FindingKind.ROW),
    (unknown_page, FindingKind.LEAKED),
    (change_computed, FindingKind.ROW),
    (contradict, FindingKind.LOG),
    (change_prompt, FindingKind.LOG),
    (lambda files: files.path("a", ".log").unlink(), FindingKind.LOG),
    (lambda files: files.path("a", ".req").unlink(), FindingKind.LOG),
    (lambda files: os.truncate(files.path("a", ".log"), 100), FindingKind.LOG),
    (lambda files: os.truncate(files.path("a", ".log"), 0), FindingKind.LOG),
    (lambda files: files.path("a", ".req").write_bytes(b"\xff\xff"), FindingKind.LOG),
    (lambda files: files.rewrite(request_id="another"), FindingKind.LOG),
    (lambda files: files.rewrite(outputs=2), FindingKind.LOG),
    (lambda files: files.path("c", ".log").write_bytes(b"half"), FindingKind.LOG),
    (lambda files: files.path("c", ".tmp").write_bytes(b"half"), FindingKind.FILE),
    (lambda files: pools.half_made(files.state).write_bytes(b"half"), FindingKind.FILE),
]


def kinds(report: Report) -> set[FindingKind]:
    return {finding.kind for finding in report.findings}


def tokens_of(state: StateDir, name: str) -> list[int]:
    output = executor_log(state.records, name)[0]
    return output.tokens[: output.known].tolist()


def adopt(state: StateDir) -> Manager:
    """The next manager and the next executor; nothing is wrong for either."""
    manager = manager_of(state)
    assert manager.core is not None and manager.core.check_integrity() == []
    assert manager.fsck().findings == []
    return manager


def test_what_a_kill_leaves_is_clean(state: StateDir) -> None:
    before = {path: path.read_bytes() for path in state.root.rglob("*") if path.is_file()}
    report = check_folder(state)
    assert report.findings == []
    assert (report.pages, report.rows, report.records) == (40, 3, 3)
    assert {path: path.read_bytes() for path in state.root.rglob("*") if path.is_file()} == before
    assert repair(state) == ([], report)
    assert {path: path.read_bytes() for path in state.root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("damage", "kind"), DAMAGE, ids=range(len(DAMAGE)))
def test_damage_is_found_repaired_and_adopted(
    state: StateDir, damage: Callable[[Files], object], kind: FindingKind
) -> None:
    untouched = tokens_of(state, "b")
    damage(Files(state))
    before = check_folder(state)
    assert kind in kinds(before)
    repaired, after = repair(state)
    assert after.findings == [] and set(before.findings) <= set(repaired)
    assert tokens_of(state, "b") == untouched
    manager = adopt(state)
    # Whoever lost a row gets one again.
    assert manager.records is not None
    for name in ("a", "b"):
        if manager.records.source(key_of(name)) is not None:
            executor_log(state.records, name)[0].set_progress(0, 40)
            assert manager.call(ensure_call(name, 60)).ensure.capacity >= 60


def test_a_row_that_is_repaired_costs_no_token(state: StateDir) -> None:
    before = tokens_of(state, "a")
    shift_generation(Files(state))
    repair(state)
    manager = adopt(state)
    assert manager.core is not None and list(manager.core.live_rows) == [(key_of("b"), 0)]
    assert tokens_of(state, "a") == before
    assert len(manager.pins()) == 1


def test_a_corrupt_page_is_never_served_again(state: StateDir) -> None:
    files = Files(state)
    page, generation = files.page(0), int(files.tables.page_word[files.page(0)]) >> 32
    corrupt_tokens(files)
    repair(state)
    word = int(files.tables.page_word[page])
    assert (word & 0xFF, word >> 32) == (PageState.FREE, generation + 1)
    assert adopt(state).call(open_call("c")).open.cached_tokens == 0


def test_a_damaged_record_is_set_aside_with_its_log(state: StateDir) -> None:
    contradict(Files(state))
    repair(state)
    assert sorted(path.name for path in state.records.glob(f"{key_of('a')}*")) == [
        f"{key_of('a')}.log.damaged",
        f"{key_of('a')}.req.damaged",
    ]
    assert len(adopt(state).records or ()) == 2


def test_several_at_once(state: StateDir) -> None:
    files = Files(state)
    for damage in (lend_page, break_pin, contradict, unknown_page, corrupt_tokens):
        damage(files)
    repaired, after = repair(state)
    assert after.findings == [] and len(repaired) >= 5
    adopt(state)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_words_change_the_repair_ends_with_a_pool_that_is_adopted(state: StateDir, seed: int) -> None:
    words = np.memmap(state.tables, np.uint64, "r+")[64:]
    rng = np.random.default_rng(seed)
    used = np.flatnonzero(words)
    words[rng.choice(used, 8, replace=False)] = rng.integers(0, 1 << 48, 8, np.uint64)
    assert repair(state)[1].findings == []
    adopt(state)


@pytest.mark.parametrize(("word", "value"), [(Header.LAYOUT, 1), (Header.BOOT_ID, 1), (Header.MAGIC, 5)])
def test_a_header_that_is_not_ours_is_never_repaired(state: StateDir, word: Header, value: int) -> None:
    Files(state).tables.header[word] = value
    before = state.tables.read_bytes()
    for act in (check_folder, repair):
        with pytest.raises(CannotAdopt, match="--discard"):
            act(state)
    assert state.tables.read_bytes() == before


def test_a_pool_without_tables_is_a_leftover(tmp_path: Path) -> None:
    state = StateDir.prepare(tmp_path / "s")
    state.pool.write_bytes(b"x" * 100)
    assert [finding.files for finding in check_folder(state).findings] == [("pool",)]
    assert repair(state)[1].findings == [] and not state.pool.exists()


def test_a_manager_checks_itself_between_two_calls(state: StateDir) -> None:
    manager = manager_of(state)
    assert manager.fsck() == check_folder(state)
    files = Files(state)
    shift_generation(files)
    files.path("b", ".log").rename(files.path("b", ".gone"))
    (state.records / "zz.tmp").write_bytes(b"")
    assert manager.core is not None
    manager.core.pages.free.pop()
    wanted = {FindingKind.STALE, FindingKind.LOG, FindingKind.FILE, FindingKind.LEAKED, FindingKind.DERIVED}
    assert kinds(manager.fsck()) == wanted


@pytest.mark.parametrize("holder", [Holder.MANAGER, Holder.EXECUTOR])
def test_nothing_is_done_to_a_folder_in_use(state: StateDir, holder: Holder) -> None:
    lock = FileLock(holder.lock(state))
    lock.acquire()
    with pytest.raises(InUse, match=f"{holder.value} still uses .*; stop it before --discard") as found:
        discard(state)
    assert found.value.holder is holder and state.tables.exists()
    lock.release()
    with vacant(state, "this"), pytest.raises(InUse):
        discard(state)
    discard(state)
    assert not state.tables.exists() and not list(state.records.iterdir())


def test_a_freed_row_keeps_its_generation(state: StateDir) -> None:
    """Or a call about the old row could reach a new one."""
    files = Files(state)
    word = int(files.tables.row_word[files.other])
    files.tables.row_entry[files.other, 2] += 1 << 32
    repair(state)
    assert int(files.tables.row_word[files.other]) == row_word(RowState.FREE, 0, word >> 32)
