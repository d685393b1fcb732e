"""One frontend of a name at a time, also where the one before was killed with its container."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pagehold.runtime.progress import Progress, State
from services.frontend import main


def test_a_frontend_of_a_container_that_was_killed_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "frontend.progress"
    progress = Progress(path)
    progress.set_state(State.READY)
    progress.begin_turn(60)
    monkeypatch.setattr(main, "_GONE_SECONDS", 0.3)
    assert not main._is_free(path)  # it is this very process

    monkeypatch.setattr("pagehold.runtime.process.pid_namespace", lambda: 1)
    assert main._is_free(path)
    over = threading.Event()

    def turn() -> None:
        while not over.wait(0.01):
            progress.begin_turn(60)

    turning = threading.Thread(target=turn)
    turning.start()
    assert not main._is_free(path)
    over.set()
    turning.join()
