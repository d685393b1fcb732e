"""Outputs that have not ended, found in the records of a state folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmanager.layout import Reason
from kvmanager.logwords import OutputWords, read_outputs
from kvmanager.service import Manager
from pagehold.runtime.statedir import StateDir
from services.cli.view import outputs
from services.cli.view.outputs import OpenOutputs
from tests.unit.kvmanager.files import executor_log, key_of, open_call


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the logs that were read."""
    keys: list[str] = []

    def counted(path: Path) -> list[OutputWords]:
        keys.append(path.stem)
        return read_outputs(path)

    monkeypatch.setattr(outputs, "read_outputs", counted)
    return keys


def test_the_latest_come_first_and_ended_ones_are_left_alone(
    state: StateDir, manager: Manager, read: list[str]
) -> None:
    assert manager.call(open_call("b", outputs=2)).HasField("open")
    os.utime(state.records / f"{key_of('a')}.req", ns=(1, 1))
    found = OpenOutputs(state)
    first = found.look()
    assert [(one.request_id, one.index) for one in first] == [("b", 0), ("b", 1), ("a", 0)]
    assert (first[2].words.prompt, first[2].words.computed, first[2].words.known) == (40, 0, 40)
    executor_log(state.records, "a")[0].set_progress(41, 42)
    assert found.look()[2].words.generated == 2
    executor_log(state.records, "b")[0].set_terminal(Reason.STOP, 0)
    assert [(one.request_id, one.index) for one in found.look()] == [("b", 1), ("a", 0)]
    executor_log(state.records, "b")[1].set_terminal(Reason.STOP, 0)
    assert [one.request_id for one in found.look()] == ["a"]
    read.clear()
    assert [one.request_id for one in found.look()] == ["a"]
    assert read == [key_of("a")], "what has ended is not read again"


def test_records_come_and_go(state: StateDir, manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    found = OpenOutputs(state)
    assert len(found.look()) == 1
    (state.records / "0.req").write_bytes(b"\xff\xff no message")
    (state.records / "0.log").write_bytes((state.records / f"{key_of('a')}.log").read_bytes())
    (state.records / "1.req").write_bytes(b"")
    (state.records / "note").touch()
    assert [one.request_id for one in found.look()] == ["a"]
    (state.records / f"{key_of('a')}.log").unlink()
    assert found.look() == []
    (state.records / f"{key_of('a')}.req").unlink()
    assert found.look() == []
    for path in state.records.iterdir():
        path.unlink()
    assert manager.call(open_call("c")).HasField("open") and manager.call(open_call("d")).HasField("open")
    monkeypatch.setattr(outputs, "_MOST_RECORDS", 1)
    assert len(found.look()) == 1
    assert len(found.look()) == 2, "the others have their turn at the next look"


def test_no_folder_is_no_request(tmp_path: Path) -> None:
    assert OpenOutputs(StateDir(tmp_path / "none")).look() == []
