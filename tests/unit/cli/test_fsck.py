"""`pagehold fsck`: exit codes, one line a finding, and what it refuses to look at."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from kvmanager import pool as pools
from kvmanager.layout import Header
from kvmanager.service import Manager
from kvmanager.vacant import ALL, Holder
from pagehold.runtime.lock import FileLock
from pagehold.runtime.statedir import StateDir
from tests.unit.cli.command import Command


def damage(state: StateDir) -> None:
    """The live row names a page of another generation, and a file is left over."""
    pool = pools.examine(state, writable=True)
    assert pool is not None
    row = int(np.flatnonzero(pool.tables.row_word)[0])
    pool.tables.row_entry[row, 2] += 1 << 32
    (state.records / "zz.tmp").write_bytes(b"")


def test_a_clean_folder(pagehold: Command, state: StateDir, manager: Manager) -> None:
    assert pagehold("fsck", "--state-dir", state.root) == 0
    (line,) = pagehold.out.splitlines()
    assert line.endswith("(nobody uses it): clean; looked at 40 pages, 2 rows, 1 records")
    assert pagehold("fsck", "--json", "--state-dir", state.root) == 0
    found = json.loads(pagehold.out)
    assert (found["live"], found["findings"], found["total"]) == (False, [], 0)
    assert (found["pages"], found["rows"], found["records"]) == (40, 2, 1)


def test_findings_then_repair_then_clean(pagehold: Command, state: StateDir, manager: Manager) -> None:
    damage(state)
    assert pagehold("fsck", "--state-dir", state.root) == 1
    file, stale, summary, remedy = pagehold.out.splitlines()
    assert file == "FILE: records/zz.tmp is a record that was never finished"
    assert stale.startswith("STALE: row ") and "2 findings" in summary and "--repair" in remedy
    assert pagehold("fsck", "--json", "--state-dir", state.root) == 1
    assert {one["kind"] for one in json.loads(pagehold.out)["findings"]} == {"FILE", "STALE"}
    assert pagehold("fsck", "--repair", "--state-dir", state.root) == 0
    assert [line.split(":")[0] for line in pagehold.out.splitlines()[:2]] == ["repaired FILE", "repaired STALE"]
    assert "clean, 2 repaired" in pagehold.out
    assert pagehold("fsck", "--repair", "--json", "--state-dir", state.root) == 0
    assert json.loads(pagehold.out)["repaired"] == []


def test_what_is_no_state_folder_is_not_checked(pagehold: Command, state: StateDir) -> None:
    for path, said in ((state.root / "none", "there is no state folder"), (state.records, "nothing of Pagehold's")):
        assert pagehold("fsck", "--state-dir", path) == 78
        assert said in pagehold.err and not pagehold.out
    assert os.listdir(state.records) == []


def test_another_users_folder_is_not_checked(
    pagehold: Command, state: StateDir, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert pagehold("fsck", "--state-dir", state.root) == 78
    assert "belongs to another user" in pagehold.err


@pytest.mark.parametrize(
    ("word", "said"),
    [(Header.LAYOUT, "has layout version"), (Header.BOOT_ID, "before the last boot"), (Header.MAGIC, "is damaged")],
)
def test_a_header_that_is_not_ours_is_said_with_what_to_do(
    pagehold: Command, state: StateDir, manager: Manager, word: Header, said: str
) -> None:
    pool = pools.examine(state, writable=True)
    assert pool is not None
    pool.tables.header[word] = 77
    for flags in ([], ["--repair"]):
        assert pagehold("fsck", *flags, "--state-dir", state.root) == 78
        assert said in pagehold.err and "--discard" in pagehold.err
    assert int(pool.tables.header[word]) == 77


def test_a_folder_in_use_is_not_repaired(pagehold: Command, state: StateDir, manager: Manager) -> None:
    damage(state)
    before = state.tables.read_bytes()
    lock = FileLock(state.executor_lock)
    lock.acquire()
    assert pagehold("fsck", "--repair", "--state-dir", state.root) == 78
    assert "an executor still uses" in pagehold.err and "stop it before --repair" in pagehold.err
    assert state.tables.read_bytes() == before
    lock.release()
    assert pagehold("fsck", "--repair", "--state-dir", state.root) == 0


@pytest.mark.parametrize("holder", ALL)
def test_a_live_folder_whose_manager_does_not_answer_is_said(
    holder: Holder, pagehold: Command, state: StateDir, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.cli.manager.ask.__defaults__", (0.2,))
    lock = FileLock(holder.lock(state))
    lock.acquire()
    assert pagehold("fsck", "--state-dir", state.root) == 78
    assert "no kvmanager of" in pagehold.err and "pagehold status" in pagehold.err
    lock.release()
