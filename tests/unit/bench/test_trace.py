from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from peers_lib.trace import IncompleteError, agreement, figures, median, percentile, read_traces

from tests.unit.bench.results import trace


def test_percentile_interpolates_between_ranks() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 0) == 1.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 100) == 4.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([0.0, 10.0], 99) == pytest.approx(9.9)
    assert median([7.0]) == 7.0
    assert math.isnan(percentile([], 50))
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile([1.0], 101)


def test_figures_of_two_requests() -> None:
    traces = [
        trace("a", (10.5, 1), (10.7, 1), (11.0, 2), submitted=10.0),
        trace("b", (10.9, 1), (12.0, 1), submitted=10.2),
    ]
    found = figures(traces, {"a": 4, "b": 2})
    assert (found.requests, found.tokens) == (2, 6)
    assert found.seconds == pytest.approx(2.0)  # from the first submission to the last token
    assert found.tokens_per_second == pytest.approx(3.0)
    assert found.first_p50 == pytest.approx(0.6)  # 0.5 and 0.7
    assert found.between_p50 == pytest.approx(0.3)  # 0.2, 0.3 and 1.1
    assert found.between_p99 == pytest.approx(0.3 + 0.98 * 0.8)


def test_a_single_message_has_nothing_between() -> None:
    assert math.isnan(figures([trace("a", (1.0, 4))], {"a": 4}).between_p50)


def test_a_step_is_a_token_however_many_come_in_a_message() -> None:
    alone = figures([trace("a", (1.0, 1), (1.2, 4), (1.4, 4))], {"a": 9})
    assert (alone.between_p50, alone.step) == pytest.approx((0.2, 0.05))
    two = figures([trace("a", (1.0, 1), (1.2, 2)), trace("b", (1.0, 1), (1.3, 1), (1.5, 2))], {"a": 3, "b": 4})
    assert (two.between_p50, two.step) == pytest.approx((0.2, 0.1))
    old = replace(two, token_p50=math.nan)
    assert old.step == old.between_p50
    assert replace(old, requests=1, first_p50=0.1, seconds=0.7).step == pytest.approx(0.1)  # of seven tokens


def test_less_than_wanted_is_no_figure() -> None:
    with pytest.raises(IncompleteError, match="request a got 1 tokens of 2"):
        figures([trace("a", (1.0, 1))], {"a": 2})
    with pytest.raises(IncompleteError, match="got 2 tokens of 2"):
        figures([trace("a", (1.0, 2), tokens=(5,))], {"a": 2})
    with pytest.raises(IncompleteError, match="no request"):
        figures([], {})


def test_agreement_ends_at_the_first_difference() -> None:
    mine = [trace("a", (1.0, 4), tokens=(1, 2, 3, 4)), trace("b", (1.0, 4), tokens=(1, 2, 3, 4))]
    theirs = [trace("a", (1.0, 4), tokens=(1, 2, 9, 4)), trace("b", (1.0, 4), tokens=(1, 2, 3, 4))]
    assert agreement(mine, mine) == 1.0
    assert agreement(mine, theirs) == 6 / 8
    assert agreement(mine, theirs[1:]) == 1.0
    assert math.isnan(agreement(mine, [trace("c", (1.0, 1))]))


def test_traces_survive_their_file(tmp_path: Path) -> None:
    traces = [trace("a", (10.5, 1), (10.7, 2), submitted=10.0), trace("b", (1.0, 1))]
    path = tmp_path / "traces"
    path.write_text("".join(each.to_json() + "\n" for each in traces))
    assert read_traces(path) == traces
