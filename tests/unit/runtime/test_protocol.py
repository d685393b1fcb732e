"""Versions of the internal messages: one apart is fine, two is refused with what to do."""

from __future__ import annotations

import pytest

from pagehold.runtime.protocol import PROTOCOL, skew


@pytest.mark.parametrize("apart", [-1, 0, 1])
def test_neighbours_speak(apart: int) -> None:
    assert not skew("executor", "frontend", PROTOCOL + apart)


def test_the_older_one_is_to_be_upgraded() -> None:
    assert "upgrade the executor" in skew("executor", "frontend", PROTOCOL + 2)
    assert "upgrade the frontend" in skew("executor", "frontend", PROTOCOL - 2)
