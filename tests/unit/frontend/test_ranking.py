"""Which outputs are returned: the order is one of means, and the same however it is computed."""

from __future__ import annotations

import math
import struct

from hypothesis import given
from hypothesis import strategies as st

from pagehold.v1 import inference_pb2 as api
from services.frontend.ranking import best, outputs_asked, outputs_sampled


def test_by_the_mean_not_by_the_sum() -> None:
    assert best([[-0.5, -0.5, -0.5], [-1.0], [-0.1, -0.7]], 3) == [2, 0, 1]


def test_as_many_as_are_asked_for() -> None:
    assert best([[-3.0], [-1.0], [-2.0]], 2) == [1, 2]


def test_ties_go_to_the_lower_index_and_empty_outputs_come_last() -> None:
    assert best([[], [-2.0], [-1.0], [-2.0, -2.0], []], 5) == [2, 1, 3, 0, 4]


def test_what_is_no_number_never_wins() -> None:
    assert best([[math.nan], [-5.0], [-math.inf, -1.0]], 3) == [1, 0, 2]


def test_sums_are_exact() -> None:
    """With rounding at each step the second would lose its small term, and the tie with it."""
    assert best([[-1.0, 0.0, 0.0], [1e16, -1.0, -1e16]], 2) == [0, 1]


float32 = st.floats(-100, 0, width=32)


@given(st.lists(st.lists(float32, max_size=6), min_size=1, max_size=8), st.integers(1, 8))
def test_a_longer_list_only_adds_to_it(logprobs: list[list[float]], n: int) -> None:
    order = best(logprobs, len(logprobs))
    assert sorted(order) == list(range(len(logprobs)))
    assert best(logprobs, n) == order[:n]
    # As they come over the wire.
    again = [list(struct.unpack(f"{len(one)}f", struct.pack(f"{len(one)}f", *one))) for one in logprobs]
    assert best(again, n) == order[:n]


def test_how_many() -> None:
    for request, asked, sampled in (
        (api.GenerateRequest(), 1, 1),
        (api.GenerateRequest(n=3), 3, 3),
        (api.GenerateRequest(best_of=4), 1, 4),
        (api.GenerateRequest(n=2, best_of=4), 2, 4),
    ):
        assert (outputs_asked(request), outputs_sampled(request)) == (asked, sampled)
