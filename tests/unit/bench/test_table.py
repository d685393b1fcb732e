from __future__ import annotations

import math
from dataclasses import replace

import pytest
from peers_lib.table import grid, milliseconds, render

from tests.unit.bench.results import entrant, outcome, report


def test_a_grid_is_markdown_and_aligned() -> None:
    assert grid(("a", "wide"), [("long one", "x"), ("", "")]) == (
        "| a        | wide |\n| -------- | ---- |\n| long one | x    |\n|          |      |"
    )


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.00123, "1.2 ms"), (0.25, "250 ms"), (9.9994, "9999 ms"), (12.34, "12.3 s"), (math.nan, "–")],
)
def test_times(seconds: float, shown: str) -> None:
    assert milliseconds(seconds) == shown


def test_every_entrant_has_a_row() -> None:
    entrants = [
        entrant("pagehold", "bfloat16"),
        entrant("peer", "bfloat16"),
        entrant("peer", "float32"),
        entrant("slow", "float32"),
        entrant("other", "float32", "not installed: scripts/bench/peers --install other"),
    ]
    outcomes = [
        outcome(1, "pagehold bfloat16", 100),
        outcome(1, "peer bfloat16", 10, same=0.5),
        outcome(1, "peer float32", 40, same=0.97),
        outcome(1, "slow float32", None),
    ]
    rows = [line for line in render(report(entrants, outcomes)).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(entrants)
    cells = {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in (line.split("|") for line in rows)}
    assert cells["pagehold bfloat16"] == [
        "100.0", "", "100 ms / 200 ms", "10.0 ms / 20.0 ms", "100 MiB", "2.5 s", "",
    ]  # fmt: skip
    assert cells["peer float32 (the faster)"][:2] == ["40.0", "2.50 × as fast"]
    assert cells["peer float32 (the faster)"][-1] == "97%"
    assert cells["peer bfloat16"][:2] == ["10.0", "10.00 × as fast"]
    assert cells["slow float32"][0] == "no figure: no end of one within 5 s"
    assert cells["other float32"][0].startswith("no figure: not installed")


def test_the_command_and_the_machine_are_named() -> None:
    text = render(report([entrant("pagehold", "bfloat16")], [outcome(1, "pagehold bfloat16", 100)]))
    assert "Made by `scripts/bench/peers --rounds 3`" in text
    assert "reads 20.0 GB/s, torch.mm float32 100 GFLOP/s" in text
    assert "load average before an engine started: 0.5 to 1.5" in text


def test_other_work_on_the_machine_is_a_warning() -> None:
    quiet = outcome(1, "pagehold bfloat16", 100)
    made = report([entrant("pagehold", "bfloat16")], [replace(quiet, others=0.05)])
    assert "other work kept 0.05 processors busy, 0.05 at most\n" in render(made)
    made = report([entrant("pagehold", "bfloat16")], [replace(quiet, others=0.05), replace(quiet, round=2, others=1.5)])
    assert "1.50 at most: **not a quiet machine" in render(made)
