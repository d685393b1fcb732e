"""Which silence belongs to a fault."""

from __future__ import annotations

import math
from collections import deque

import pytest

from services.torture.gaps import Sign, gap, quantile
from services.torture.stream import Marks

TOKENS = [1.0, 2.0, 2.5, 6.0, 6.5, 9.0]


def marks(notices: list[float] | None = None, breaks: list[float] | None = None) -> Marks:
    return Marks(deque(TOKENS), deque(notices or []), deque(breaks or []))


def test_the_interval_in_which_the_executor_was_replaced() -> None:
    # 2.5 was on its way when the fault came at 2.2.
    assert gap(marks(notices=[5.0]), 2.2, 6.2, Sign.NOTICE) == 3.5


def test_only_streams_that_broke_had_to_do_with_the_frontend() -> None:
    assert gap(marks(breaks=[6.1]), 6.05, 8.0, Sign.BREAK) == 0.5
    assert math.isnan(gap(marks(), 6.05, 8.0, Sign.BREAK))
    assert math.isnan(gap(marks(breaks=[0.5]), 6.05, 8.0, Sign.BREAK)), "another fault's"


def test_else_the_longest_that_overlaps() -> None:
    assert gap(marks(), 2.2, 6.2, Sign.NONE) == 3.5
    assert gap(marks(), 6.2, 6.4, Sign.NONE) == 0.5


def test_nothing_is_said_of_a_stream_that_had_no_token_before_or_none_after() -> None:
    assert math.isnan(gap(marks(), 0.5, 3.0, Sign.NONE))
    assert math.isnan(gap(marks(notices=[9.5]), 8.0, 10.0, Sign.NOTICE))


def test_quantiles_are_values_that_occurred() -> None:
    assert [quantile([4, 1, 3, 2], share) for share in (0.0, 0.5, 0.75, 0.99)] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)
