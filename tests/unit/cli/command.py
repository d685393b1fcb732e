"""Runs a command in this process."""

from __future__ import annotations

import pytest

from services.cli import main as cli


class Command:
    """What a command returned and said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: object) -> int:
        """Returns the exit code."""
        self._monkeypatch.setattr("sys.argv", ["pagehold", *map(str, words)])
        code = cli.main()
        self.out, self.err = self._capsys.readouterr()
        return code
