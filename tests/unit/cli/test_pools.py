"""`pagehold pools`: what it lists, what it removes, and what it leaves alone."""

from __future__ import annotations

import json

from kvmanager.service import Manager
from pagehold.runtime.lock import FileLock
from pagehold.runtime.statedir import StateDir
from tests.unit.cli.command import Command

KEYS = {
    "path", "live", "held_by", "manager_pid", "executor_pid", "age_seconds", "condition", "reason", "epoch",
    "fingerprint", "pool_bytes", "device", "device_bytes", "tables_bytes", "records_bytes", "records", "unfinished",
}  # fmt: skip


def test_all_folders_beside_the_state_folder_are_listed(pagehold: Command, state: StateDir, manager: Manager) -> None:
    other = StateDir.prepare(state.root.parent / "other")
    other.manager_lock.touch()
    (state.root.parent / "foreign").mkdir()
    assert pagehold("pools", "--json", "--state-dir", state.root) == 0
    first, second = json.loads(pagehold.out)
    assert (first["path"], second["path"]) == (str(other.root), str(state.root))
    assert set(first) == set(second) == KEYS
    assert (first["condition"], second["condition"]) == ("no tables", "sound")
    assert second["fingerprint"] == "ab" * 6 and (second["records"], second["unfinished"]) == (1, 1)
    assert pagehold("pools", "--state-dir", state.root) == 0
    assert f"{state.root}: dead" in pagehold.out and "1 records (1 not ended)" in pagehold.out
    assert "pagehold pools --reclaim" in pagehold.out


def test_named_folders_alone_are_looked_at(pagehold: Command, state: StateDir, manager: Manager) -> None:
    other = StateDir.prepare(state.root.parent / "other")
    other.manager_lock.touch()
    assert pagehold("pools", "--json", other.root) == 0
    assert [one["path"] for one in json.loads(pagehold.out)] == [str(other.root)]
    assert pagehold("pools", "--reclaim", "--force", other.root) == 0
    assert not other.root.exists() and state.tables.exists()
    assert pagehold("pools", state.records) == 1
    assert "is no state folder of yours" in pagehold.err


def test_reclaim_takes_the_dead_and_leaves_the_living(pagehold: Command, state: StateDir, manager: Manager) -> None:
    other = StateDir.prepare(state.root.parent / "other")
    other.pool.write_bytes(b"x" * 8192)
    other.tables.with_suffix(".new").write_bytes(b"x")
    lock = FileLock(state.supervisor_lock)
    lock.acquire()
    assert pagehold("pools", "--reclaim", "--force", "--state-dir", state.root) == 0
    assert f"{state.root}: kept, it is live: a supervisor uses it" in pagehold.out
    assert f"{other.root}: reclaimed" in pagehold.out
    assert not other.root.exists() and state.tables.exists()
    lock.release()
    assert pagehold("pools", "--reclaim", "--json", "--state-dir", state.root) == 0
    (kept,) = json.loads(pagehold.out)["folders"]
    assert "--force drops them" in kept["kept"] and state.tables.exists()
    held = sum(path.stat().st_blocks * 512 for path in (state.pool, state.tables, *state.records.iterdir()))
    assert pagehold("pools", "--reclaim", "--force", "--json", "--state-dir", state.root) == 0
    assert json.loads(pagehold.out)["reclaimed"] == held > 0
    assert not state.root.exists()
    assert pagehold("pools", "--state-dir", state.root) == 0
    assert "no state folders" in pagehold.out
