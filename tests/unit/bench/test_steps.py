"""What is made of a trace of steps."""

from __future__ import annotations

import pytest
from step_times import TooShort, render, steady, summarize

from services.executor.trace import StepLine


def line(waited: int = 0, lacking: int = 0, sequences: int = 4, positions: int = 4, total: int = 1000) -> StepLine:
    return StepLine(total, 800, waited, lacking, positions, sequences)


def test_only_steps_in_which_all_decode_count() -> None:
    start = [line(sequences=1, positions=8), line(sequences=4, positions=11)]
    end = [line(sequences=3, positions=3)]
    found = steady([*start, *[line()] * 5, line(lacking=1, sequences=3, positions=3), line(), *end], 4, 7)
    assert found == [*[line()] * 5, line(lacking=1, sequences=3, positions=3), line()]
    with pytest.raises(TooShort, match="7 steps with 4 streams, 8 were wanted"):
        steady([*start, *[line()] * 7, *end], 4, 8)


def test_shares_are_of_each_step_and_of_all_time() -> None:
    found = summarize([*[line()] * 98, line(waited=500, lacking=2, total=2000), line(waited=100)], 4)
    assert (found.steps_that_waited, found.steps_with_left_out) == (2, 1)
    assert found.waiting_share_median == 0 and found.waiting_share_p99 == pytest.approx(0.1015)
    assert found.waiting_share_total == pytest.approx(600 / 101_000)
    assert "2 steps waited, 1 left a sequence out" in render(found)
