"""Commands over real files."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmanager.service import Manager
from pagehold.runtime.statedir import StateDir
from pagehold.v1 import inference_pb2 as api
from tests.unit.cli.command import Command
from tests.unit.kvmanager.files import attached, close_call, ensure_call, executor_log, open_call


@pytest.fixture
def pagehold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return StateDir.prepare(tmp_path / "folders" / "state")


@pytest.fixture
def manager(state: StateDir) -> Manager:
    """A live row and a pinned prefix over two pages; its process holds no lock."""
    manager = attached(state)
    state.manager_lock.touch()
    request = api.GenerateRequest(pin_prefix="system").SerializeToString()
    assert manager.call(open_call("a", request=request)).HasField("open")
    granted = manager.call(ensure_call("a", 60)).ensure
    executor_log(state.records, "a")[0].set_progress(40, 40)
    manager.call(close_call("a", granted.row_generation))
    executor_log(state.records, "a")[0].set_progress(0, 40)
    assert manager.call(ensure_call("a", 60)).HasField("ensure")
    return manager
