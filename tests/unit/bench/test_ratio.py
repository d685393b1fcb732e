from __future__ import annotations

import pytest
from peers_lib.ratio import fastest, pairs, ratios

from tests.unit.bench.results import entrant, outcome, report

OURS = "pagehold bfloat16"
SLOW, FAST = "peer bfloat16", "peer float32"


def test_pairs_are_of_the_same_round() -> None:
    mine = [outcome(1, OURS, 100), outcome(2, OURS, 90), outcome(3, OURS, 80)]
    theirs = [outcome(3, FAST, 40), outcome(1, FAST, 20), outcome(2, FAST, None)]
    assert pairs(mine, theirs, "tokens_per_second") == (5.0, 2.0)


def test_the_median_is_of_ratios_and_not_the_ratio_of_medians() -> None:
    mine = [outcome(1, OURS, 100), outcome(2, OURS, 90), outcome(3, OURS, 30)]
    theirs = [outcome(1, FAST, 20), outcome(2, FAST, 45), outcome(3, FAST, 10)]
    made = report([entrant("pagehold", "bfloat16"), entrant("peer", "float32")], mine + theirs)
    speed = next(ratio for ratio in ratios(made) if ratio.quantity == "tokens_per_second")
    assert speed.by_round == (5.0, 2.0, 3.0)
    assert speed.median == 3.0
    assert speed.fastest


def test_an_engine_is_measured_by_its_faster_arithmetic() -> None:
    entrants = [entrant("pagehold", "bfloat16"), entrant("peer", "bfloat16"), entrant("peer", "float32")]
    outcomes = [outcome(1, OURS, 100), outcome(1, SLOW, 10, peak=50 << 20), outcome(1, FAST, 50, peak=200 << 20)]
    made = report(entrants, outcomes)
    assert fastest(made, "one", "peer") == FAST
    found = {(ratio.peer, ratio.quantity): ratio for ratio in ratios(made)}
    assert found[FAST, "tokens_per_second"].median == 2.0
    assert found[FAST, "tokens_per_second"].fastest
    assert not found[SLOW, "tokens_per_second"].fastest
    assert found[SLOW, "peak_bytes"].median == pytest.approx(2.0)
    assert found[FAST, "peak_bytes"].median == pytest.approx(0.5)


def test_without_a_pair_there_is_no_ratio() -> None:
    alone = report([entrant("peer", "float32")], [outcome(1, FAST, 50)])
    assert ratios(alone) == []
    failed = report(
        [entrant("pagehold", "bfloat16"), entrant("peer", "float32")], [outcome(1, OURS, 5), outcome(1, FAST, None)]
    )
    assert ratios(failed) == []
    assert fastest(failed, "one", "peer") is None
