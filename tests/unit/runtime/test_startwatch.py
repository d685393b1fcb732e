"""A process that starts shows that it runs, until its turns do."""

from __future__ import annotations

import time
from pathlib import Path

from pagehold.runtime.progress import Progress, read_progress
from pagehold.runtime.startwatch import StartWatch


def test_it_beats_until_it_is_over(tmp_path: Path) -> None:
    path = tmp_path / "executor.progress"
    watch = StartWatch(Progress(path), 0.2)
    deadlines = set()
    give_up = time.monotonic() + 30
    while len(deadlines) < 4 and time.monotonic() < give_up:
        view = read_progress(path)
        assert view is not None
        deadlines.add(view.deadline_ns)
        time.sleep(0.01)
    assert len(deadlines) == 4 and 0 not in deadlines
    watch.end()
    time.sleep(0.3)
    view = read_progress(path)
    assert view is not None and view.deadline_ns == 0 and view.turn == 1
