"""The file in which trials pile up, and the page that is made from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagehold.runtime.failpoint import POINTS
from services.torture import results
from services.torture.faults import ANYWHERE, Action, Row
from services.torture.matrix import render_page
from services.torture.results import Run, Trial

DOCS = Path(__file__).parents[3] / "docs"
KILL = Row("executor", ANYWHERE, Action.KILL)


def run(seed: int = 1, trials: int = 2) -> Run:
    found = Run(seed, "0.1.0", "abc", "2-core X", "2026-01-01T00:00:00+00:00", ["--standby"], 512 << 20, 0.1)
    found.trials = [Trial(KILL, ["decode", "fork"], True, 16, [90, 110, 400]) for _ in range(trials)]
    found.streams_checked, found.seconds = 40, 7.5
    return found


def test_runs_pile_up_and_a_run_takes_its_own_place(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert results.read(path) == []
    results.append(path, run(1))
    results.append(path, run(2, trials=0))
    results.append(path, run(1, trials=3))
    assert results.read(path) == [run(2, trials=0), run(1, trials=3)]
    assert results.trials_of(results.read(path)) == {KILL: 3}
    assert [one.name for one in tmp_path.iterdir()] == ["results.json"]


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"runs": [{"seed": 1}]}')
    with pytest.raises(ValueError, match="holds no results"):
        results.read(path)


def test_two_thousand_trials_stay_small(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    one = run(trials=0)
    row = Row("kvmanager", "kvmanager.ensure_rows.before", Action.KILL)
    gaps = [1000 + at for at in range(16)]
    one.trials = [Trial(row, ["decode", "fork", "prefill"], True, 16, gaps) for _ in range(2000)]
    results.append(path, one)
    assert path.stat().st_size < 1 << 20


def test_the_page_counts_what_the_file_holds() -> None:
    page = render_page([run(1), run(2)], {"executor.commit.before": "token slots, and the progress word"})
    assert "| of which kills | 4 |" in page
    assert "| executor, standby ready | 512 MiB | abc | p50 150 ms, p99 500 ms | 4 | 64 | 110 ms | 400 ms |" in page
    assert "| any instruction | kill | goes on | 4 | 64 | 0 | 110 ms | 400 ms |" in page
    commit = "| `executor.commit.before`: token slots, and the progress word | stop | is found, killed, goes on |"
    assert f"{commit} 0 | 0 | - | - | - |" in page


def test_a_deviation_shows() -> None:
    bad = run()
    bad.wrong = bad.trials[-1].wrong = 1
    page = render_page([bad], {})
    assert "NOT CLEAN" in page
    assert "| any instruction | kill | goes on | 2 | 32 | 1 |" in page


def test_the_page_in_the_docs_is_made_from_the_file_beside_it() -> None:
    runs = results.read(DOCS / "crash-matrix.json")
    assert (DOCS / "crash-matrix.md").read_text() == render_page(runs, POINTS)
    assert all(one.is_clean for one in runs)
