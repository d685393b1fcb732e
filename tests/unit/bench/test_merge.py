from __future__ import annotations

from dataclasses import replace

import pytest
from peers_lib import merge
from peers_lib.merge import rows, times_as_fast
from peers_lib.report import Load
from peers_lib.scenario import Group

from tests.unit.bench.results import LOADS, entrant, outcome, report

OURS = "pagehold bfloat16"
MINE = entrant("pagehold", "bfloat16")
PEER = entrant("vllm", "float32")
LATER = "2026-02-02T03:04:05+00:00"


def test_runs_of_different_engines_are_one_table() -> None:
    first = report([MINE], [outcome(1, OURS, 100)])
    second = report([PEER], [outcome(1, "vllm float32", 40)], started=LATER)
    found = rows([second, first], "one")
    assert [row.entrant.name for row in found] == [OURS, "vllm float32"]
    assert [row.report for row in found] == [first, second]
    assert times_as_fast(found, found[1]) == (2.5, False)
    assert times_as_fast(found, found[0]) is None


def test_a_ratio_is_within_one_run_where_it_can_be() -> None:
    first = report([MINE, PEER], [outcome(1, OURS, 100), outcome(1, "vllm float32", 40)])
    second = report([PEER], [outcome(1, "vllm float32", 50)], started=LATER)
    found = rows([first, second], "one")
    assert found[1].report is second
    assert times_as_fast(found, found[1]) == (2.0, False)
    found = rows([first], "one")
    assert times_as_fast(found, found[1]) == (2.5, True)
    # Also where a later run's figures of Pagehold are the ones that are shown.
    third = report([MINE], [outcome(1, OURS, 200)], started=LATER)
    found = rows([first, third], "one")
    assert found[0].speed == 200
    assert times_as_fast(found, found[1]) == (2.5, True)


def test_later_figures_count_but_a_later_failure_does_not() -> None:
    old = report([MINE], [outcome(1, OURS, 100)])
    new = report([MINE], [outcome(1, OURS, 120)], started=LATER)
    failed = report([MINE], [outcome(1, OURS, None)], started="2026-03-02T03:04:05+00:00")
    (row,) = rows([failed, new, old], "one")
    assert row.speed == 120
    (row,) = rows([failed], "one")
    assert row.reason == "no end of one within 5 s"


def test_the_first_row_of_ours_is_what_variants_are_compared_with() -> None:
    fast = entrant("pagehold", "bfloat16", flags=("weights=int8",))
    made = report([MINE, fast], [outcome(1, OURS, 100), outcome(1, fast.name, 200)])
    found = rows([made], "one")
    assert times_as_fast(found, found[1]) == (0.5, True)
    assert merge.fastest(found) == {fast.name}


def test_what_does_not_belong_together() -> None:
    one = report([MINE], [])
    with pytest.raises(ValueError, match="no report"):
        merge.check([])
    with pytest.raises(ValueError, match="different machines"):
        merge.check([one, replace(one, machine=replace(one.machine, processors=4))])
    with pytest.raises(ValueError, match="different models"):
        merge.check([one, replace(one, model="other")])
    with pytest.raises(ValueError, match="different scenarios of the name one"):
        merge.check([one, report([MINE], [], {"one": replace(LOADS["one"], new_tokens=5)})])
    merge.check([one, replace(one, started=LATER)])


def test_scenarios_of_a_group() -> None:
    loads = {"one": LOADS["one"], "growth-2": Load("2", Group.GROWTH, [1, 1], 4)}
    made = report([MINE], [], loads)
    assert list(merge.scenarios([made])) == ["one", "growth-2"]
    assert list(merge.scenarios([made], Group.GROWTH)) == ["growth-2"]
