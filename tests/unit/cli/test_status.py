"""`pagehold status`: pages by what they are used for, read from the tables alone."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from kvmanager.device.memory import uuid_name
from kvmanager.layout import PoolKind
from kvmanager.service import Manager
from pagehold.runtime.lock import FileLock
from pagehold.runtime.progress import Progress, State
from pagehold.runtime.statedir import StateDir
from tests.device.fake_memory import DEVICE
from tests.unit.cli.command import Command
from tests.unit.kvmanager.files import close_call, key_of
from tests.unit.kvmanager.test_device_pool import attach, device_request, manager_of


def pool_of(pagehold: Command, state: StateDir) -> dict[str, int]:
    assert pagehold("status", "--json", "--state-dir", state.root) == 0
    found: dict[str, int] = json.loads(pagehold.out)["pool"]
    return found


def components_of(pagehold: Command, state: StateDir) -> dict[str, dict[str, Any]]:
    assert pagehold("status", "--json", "--state-dir", state.root) == 0
    found: dict[str, dict[str, Any]] = json.loads(pagehold.out)["components"]
    return found


def test_pinned_pages_are_used_pages(pagehold: Command, state: StateDir, manager: Manager) -> None:
    # The row shares the two pinned pages and has two of its own.
    assert pool_of(pagehold, state) == {"pages": 40, "free": 36, "shared": 2, "pinned": 2, "page_size": 16}
    assert manager.core is not None
    row = manager.core.live_rows[key_of("a"), 0]
    assert manager.call(close_call("a", row.generation)).HasField("close")
    assert pool_of(pagehold, state) == {"pages": 40, "free": 38, "shared": 0, "pinned": 2, "page_size": 16}
    assert manager.stats(False).free_pages == 38
    assert pagehold("status", "--state-dir", state.root) == 0
    assert "40 of 16 tokens, 38 free, 0 shared, 2 pinned" in pagehold.out


def test_a_standby_that_took_over_is_one_process(pagehold: Command, state: StateDir) -> None:
    standby = Progress(state.progress("executor-standby"))
    standby.set_state(State.STANDBY)
    assert list(components_of(pagehold, state)) == ["frontend", "kvmanager", "executor", "executor-standby"]
    standby.set_state(State.DOWN)
    Progress(state.progress("executor")).set_state(State.READY)
    found = components_of(pagehold, state)
    assert list(found) == ["frontend", "kvmanager", "executor"]
    assert found["executor"]["pid"] == os.getpid()


def test_a_damaged_record_is_passed_over(pagehold: Command, state: StateDir, manager: Manager) -> None:
    (state.records / "0.req").write_bytes(b"\xff\xff no message")
    (state.records / "0.log").write_bytes((state.records / f"{key_of('a')}.log").read_bytes())
    assert pagehold("status", "--json", "--state-dir", state.root) == 0
    assert [one["request_id"] for one in json.loads(pagehold.out)["sequences"]] == ["a"]


def test_a_pool_on_a_device_is_shown_with_its_device(pagehold: Command, state: StateDir) -> None:
    request = device_request(b"1" * 16, PoolKind.IPC, kv_dtype="fp8_e4m3")
    request.scales.extend([1.0, 0.5])
    assert attach(manager_of(state), state, request).HasField("attach")
    state.manager_lock.touch()
    assert pool_of(pagehold, state) == {"pages": 81, "free": 81, "shared": 0, "pinned": 0, "page_size": 16}
    lock = FileLock(state.manager_lock)
    lock.acquire()
    assert pagehold("pools", state.root) == 0
    assert f"pool 0.1 MiB on {uuid_name(DEVICE)}, tables" in pagehold.out
    lock.release()


def test_findings_between_calls_are_shown(pagehold: Command, state: StateDir, manager: Manager) -> None:
    progress = Progress(state.progress("kvmanager"))
    progress.set_state(State.READY)
    assert pagehold("status", "--state-dir", state.root) == 0
    assert "integrity" not in pagehold.out
    progress.set_findings(3)
    assert pagehold("status", "--state-dir", state.root) == 0
    assert "integrity: 3 findings; run pagehold fsck" in pagehold.out
    assert pagehold("status", "--json", "--state-dir", state.root) == 0
    assert json.loads(pagehold.out)["components"]["kvmanager"]["integrity_findings"] == 3


def test_another_containers_executor_runs_as_long_as_it_holds_its_lock(
    pagehold: Command, state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress(state.progress("executor"))
    progress.set_state(State.READY)
    progress.beat(60)  # whose end is a long way off, but not the process's
    monkeypatch.setattr("pagehold.runtime.process.pid_namespace", lambda: 1)
    lock = FileLock(state.executor_lock)
    lock.acquire()
    assert pagehold("status", "--json", "--state-dir", state.root) == 0
    assert json.loads(pagehold.out)["components"]["executor"]["state"] == "ready"
    lock.release()
    assert pagehold("status", "--json", "--state-dir", state.root) == 0
    assert json.loads(pagehold.out)["components"]["executor"]["state"] == "down"
