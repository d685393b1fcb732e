from __future__ import annotations

import math
from dataclasses import replace

import pytest
from peers_lib.report import Load
from peers_lib.scenario import Group
from peers_lib.table import grid, milliseconds, render

from tests.unit.bench.results import LOADS, entrant, outcome, report


def test_a_grid_is_markdown_and_aligned() -> None:
    assert grid(("a", "wide"), [("long one", "x"), ("", "")]) == (
        "| a        | wide |\n| -------- | ---- |\n| long one | x    |\n|          |      |"
    )


def test_a_long_reason_does_not_make_all_rows_long() -> None:
    first, _, reason, other = grid(("a", "b"), [("no figure: " + "x" * 100, ""), ("1", "2")]).splitlines()
    assert len(first) == len(other) == len("| a | b |")
    assert "x" * 100 in reason


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
    rows = [line for line in render([report(entrants, outcomes)]).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(entrants)
    cells = {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in (line.split("|") for line in rows)}
    assert cells["pagehold bfloat16"] == [
        "100.0", "0%", "", "100 ms / 200 ms", "10.0 ms / 20.0 ms", "100 MiB", "2.5 s", "",
    ]  # fmt: skip
    assert cells["peer float32 (the fastest)"][:3] == ["40.0", "0%", "2.50 × as fast"]
    assert cells["peer float32 (the fastest)"][-1] == "97%"
    assert cells["peer bfloat16"][:3] == ["10.0", "0%", "10.00 × as fast"]
    assert cells["slow float32"][0] == "no figure: no end of one within 5 s"
    assert cells["other float32"][0].startswith("no figure: not installed")


def test_the_command_and_the_machine_are_named() -> None:
    text = render([report([entrant("pagehold", "bfloat16")], [outcome(1, "pagehold bfloat16", 100)])])
    assert "Made by `scripts/bench/peers --rounds 3`" in text
    assert "reads 20.0 GB/s, torch.mm float32 100 GFLOP/s" in text
    assert "load average before an engine started: 0.5 to 1.5" in text


def test_other_work_on_the_machine_is_a_warning() -> None:
    quiet = outcome(1, "pagehold bfloat16", 100)
    made = report([entrant("pagehold", "bfloat16")], [replace(quiet, others=0.05)])
    assert "other work kept 0.05 processors busy, 0.05 at most\n" in render([made])
    made = report([entrant("pagehold", "bfloat16")], [replace(quiet, others=0.05), replace(quiet, round=2, others=1.5)])
    assert "1.50 at most: **not a quiet machine" in render([made])


def cells_of(text: str, title: str) -> dict[str, list[str]]:
    """Rows of the table below a title, by their first cell."""
    table = text.partition(f"**{title}")[2].partition("\n\n")[2].partition("\n\n")[0]
    return {
        row[0]: row[1:] for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    }


def test_growth_is_one_table_of_steps_and_the_bound() -> None:
    mine, peer = entrant("pagehold", "bfloat16"), entrant("llama.cpp", "Q8_0")
    loads = {f"growth-{count}": Load(f"{count}", Group.GROWTH, [16] * count, 48) for count in (1, 512)}
    outcomes = [
        outcome(1, mine.name, 100, scenario="growth-1", between=0.010),
        outcome(1, mine.name, 900, scenario="growth-512", between=0.2),
        outcome(1, peer.name, 50, scenario="growth-1", between=0.020),
        replace(outcome(1, peer.name, None, scenario="growth-512"), reason="it has 256 slots at most"),
    ]
    text = render([report([mine, peer], outcomes, loads)])
    found = cells_of(text, "Median step of so many sequences")
    assert found["engine"] == ["1", "512"]
    assert found[mine.name] == ["10.0 ms", "200 ms"]
    assert found[peer.name] == ["20.0 ms", "no figure: it has 256 slots at most"]
    assert list(found)[-1] == "the bound"
    assert "`growth-1`" not in text


def test_a_long_context_against_a_short_one() -> None:
    mine = entrant("pagehold", "bfloat16")
    loads = {"one": LOADS["one"], "long": Load("1 request", Group.BATCH, [8000], 100)}
    outcomes = [outcome(1, mine.name, 100, between=0.01), outcome(1, mine.name, 50, scenario="long", between=0.015)]
    found = cells_of(render([report([mine], outcomes, loads)]), "What a long context costs")
    assert found["engine"] == ["step behind 64 tokens", "step behind 8000 tokens", "takes"]
    assert found[mine.name] == ["10.0 ms", "15.0 ms", "1.50 ×"]
    assert "a long context" not in render([report([mine], outcomes)])


def test_runs_of_another_time_are_marked() -> None:
    first = report([entrant("pagehold", "bfloat16")], [outcome(1, "pagehold bfloat16", 100)])
    second = report([entrant("vllm", "float32")], [outcome(1, "vllm float32", 50)], started="2026-02-02T00:00:00+00:00")
    text = render([first, second])
    assert "2.00 × as fast †" in text
    assert "2026-01-02T03:04:05+00:00, at commit" in text and "2026-02-02T00:00:00+00:00, at commit" in text
