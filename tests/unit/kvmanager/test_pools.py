"""State folders on disk: found, told apart, and removed when their owners are dead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvmanager import pool as pools
from kvmanager.folders import Condition, Kept, find, is_ours, reclaim, survey
from kvmanager.layout import HEADER_WORDS, Header, Reason
from kvmanager.vacant import ALL, Holder, InUse
from pagehold.runtime.lock import FileLock, is_held
from pagehold.runtime.progress import Progress
from pagehold.runtime.statedir import StateDir
from tests.unit.kvmanager.files import FINGERPRINT, attached, ensure_call, executor_log, open_call


def used(root: Path, name: str, unfinished: bool = True) -> StateDir:
    """A folder that its owners have left."""
    state = StateDir.prepare(root / name)
    manager = attached(state)
    state.manager_lock.touch()
    for request in "ab":
        manager.call(open_call(request))
        manager.call(ensure_call(request, 40))
        if not unfinished or request == "b":
            executor_log(state.records, request)[0].set_terminal(Reason.CANCELLED, 0)
    return state


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return used(tmp_path, "used")


@pytest.fixture
def held(state: StateDir) -> Iterator[FileLock]:
    lock = FileLock(state.manager_lock)
    lock.acquire()
    yield lock
    lock.release()


def test_what_a_dead_folder_holds(state: StateDir) -> None:
    found = survey(state)
    assert (found.holders, found.manager_pid, found.executor_pid, found.is_live) == ((), None, None, False)
    assert (found.condition, found.reason, found.epoch) == (Condition.SOUND, "", 1)
    assert (found.records, found.unfinished, found.fingerprint) == (2, 1, FINGERPRINT)
    assert found.pool_bytes == state.pool.stat().st_blocks * 512 > 0
    assert found.tables_bytes == state.tables.stat().st_blocks * 512 > 0
    assert found.records_bytes == sum(path.stat().st_blocks * 512 for path in state.records.iterdir())
    os.utime(state.manager_lock, (1, 1))
    assert survey(state).age_seconds > 1e9


@pytest.mark.parametrize("holder", ALL)
def test_a_folder_lives_by_its_locks(state: StateDir, holder: Holder) -> None:
    Progress(state.progress("kvmanager"))
    assert not survey(state).is_live, "a pid alone is no life"
    lock = FileLock(holder.lock(state))
    lock.acquire()
    found = survey(state)
    assert (found.holders, found.manager_pid) == ((holder,), os.getpid())
    with pytest.raises(InUse) as busy:
        reclaim(state, force=True)
    assert busy.value.holder is holder and state.tables.exists()
    lock.release()
    assert reclaim(state, force=True)


def test_looking_leaves_no_trace_and_takes_no_lock(state: StateDir) -> None:
    before = sorted(path.name for path in state.root.rglob("*"))
    survey(state)
    assert sorted(path.name for path in state.root.rglob("*")) == before
    lock = FileLock(state.manager_lock)
    assert not is_held(state.manager_lock)
    lock.acquire()
    assert is_held(state.manager_lock) and is_held(state.manager_lock)
    lock.release()


def test_unfinished_requests_keep_a_folder(state: StateDir) -> None:
    kept = reclaim(state, force=False)
    assert isinstance(kept, Kept) and "1 of its requests have not ended; --force" in kept.reason
    assert state.tables.exists() and len(list(state.records.iterdir())) == 4
    nbytes = survey(state).nbytes
    assert reclaim(state, force=True) == nbytes
    assert not state.root.exists()


def test_a_folder_whose_requests_have_ended_goes_without_force(tmp_path: Path) -> None:
    state = used(tmp_path, "s", unfinished=False)
    (state.root / "notes.txt").write_text("an operator's own")
    assert reclaim(state, force=False)
    assert [path.name for path in state.root.iterdir()] == ["notes.txt"]


def test_damaged_folders_say_why(state: StateDir) -> None:
    header = np.memmap(state.tables, np.uint64, "r+", shape=(HEADER_WORDS,))
    for word, said in ((Header.BOOT_ID, "before the last boot"), (Header.LAYOUT, "has layout version")):
        before = int(header[word])
        header[word] = 99
        found = survey(state)
        assert found.condition is Condition.UNUSABLE and said in found.reason
        assert found.fingerprint == FINGERPRINT
        header[word] = before
    os.truncate(state.tables, 10)
    found = survey(state)
    assert found.condition is Condition.UNUSABLE and found.fingerprint == ""
    assert reclaim(state, force=True)


def test_leftovers_without_tables_are_found_and_removed(tmp_path: Path) -> None:
    state = StateDir.prepare(tmp_path / "s")
    state.manager_lock.touch()
    pools.half_made(state).write_bytes(b"x" * 10_000)
    state.pool.write_bytes(b"x" * 100_000)
    found = survey(state)
    assert (found.condition, found.records) == (Condition.NO_TABLES, 0)
    assert found.nbytes >= 110_000
    assert reclaim(state, force=False) == found.nbytes and not state.root.exists()


def test_only_folders_of_this_user_with_something_of_ours(
    tmp_path: Path, state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "pool").write_bytes(b"")
    (tmp_path / "link").symlink_to(state.root)
    used(tmp_path, "another")
    assert [one.root.name for one in find(tmp_path)] == ["another", "used"]
    assert find(tmp_path / "none") == []
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not is_ours(state) and find(tmp_path) == []
