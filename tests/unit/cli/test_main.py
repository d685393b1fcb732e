"""The command line: help, wrong usage, and status of a folder where nothing runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.cli import main as cli


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["pagehold", *words])
    try:
        return cli.main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


def test_overview_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*cli.COMMANDS, "run COMPONENT"))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_flag_is_explained(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *name.split(), "--help") == 0
    assert "usage: pagehold" in capsys.readouterr().out
    for field in cli.COMMANDS[name].settings.model_fields.values():
        assert field.description


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["frobnicate"], "no command 'frobnicate'"),
        (["up", "--kv-memory", "lots"], "--kv-memory: want a size such as 4GiB"),
        (["up", "--page-size", "0"], "--page-size: input should be greater than or equal to 8"),
        (["up", "--page-size", "20"], "--page-size: input should be a multiple of 8"),
        (["up", "--colour"], "--colour"),
        (["generate"], "PROMPT"),
        (["prefix", "unpin"], "NAME"),
        (["fsck", "--repare"], "--repare"),
    ],
)
def test_wrong_usage_is_one_clear_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *words) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(("words", "code"), [([], 2), (["drop"], 2), (["--help"], 0)])
def test_prefix_needs_something_to_do(
    words: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "prefix", *words) == code
    assert "usage: pagehold prefix {list,pin,unpin}" in capsys.readouterr().out


def test_status_answers_where_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "status", "--json", "--state-dir", str(tmp_path / "none")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["components"]["executor"] == {"pid": None, "state": "down"}
    assert found["pool"]["pages"] == 0
    assert found["sequences"] == []
    assert run(monkeypatch, "status", "--state-dir", str(tmp_path / "none")) == 0
    assert "down" in capsys.readouterr().out


def test_generate_without_a_server_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("services.cli.generate.Client", _impatient)
    assert run(monkeypatch, "generate", "--address", "127.0.0.1:1", "hello") == 1
    assert "start one with `pagehold up`" in capsys.readouterr().err


def _impatient(address: str, resume_seconds: float) -> object:
    from pagehold.client import Client

    return Client(address, resume_seconds=0.1)
