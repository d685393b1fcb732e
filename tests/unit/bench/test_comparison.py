"""What scripts/bench/comparison would run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from peers_lib import scenario
from peers_lib.cli import parser
from peers_lib.contestant import BENCH, OURS, choose

COMPARISON = BENCH / "comparison"
PARTS = dict(re.findall(r'^  \[(\w+)\]="(.*)"$', COMPARISON.read_text(), re.MULTILINE))


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_run(part: str) -> None:
    wanted = parser().parse_args(PARTS[part].split())
    assert scenario.choose(wanted.scenarios, quick=False)
    assert choose(wanted.engines)[0].engine.name == OURS  # ratios are within one run


def test_the_parts_have_every_scenario() -> None:
    words = [parser().parse_args(text.split()).scenarios for text in PARTS.values()]
    run = {one for names in words for one in scenario.choose(names, quick=False)}
    assert run == set(scenario.SCENARIOS)


@pytest.mark.parametrize("words", [[], ["a/b"], ["xeon", "nope"], ["xeon", "batches", "nope"]])
def test_bad_words_run_nothing(words: list[str]) -> None:
    before = set(Path(BENCH.parents[1] / "docs" / "measurements").iterdir())
    done = subprocess.run([COMPARISON, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "growth" in done.stderr
    assert set(Path(BENCH.parents[1] / "docs" / "measurements").iterdir()) == before
