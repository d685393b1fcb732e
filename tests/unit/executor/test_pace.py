"""What a step may take: known from its like, and never from other sizes."""

from __future__ import annotations

from services.executor.pace import Pace


def test_before_steps_were_seen_a_position_has_a_tenth_of_a_second() -> None:
    assert Pace().seconds(512) == 51.2


def test_quick_steps_make_the_limit_short() -> None:
    pace = Pace()
    for _ in range(8):
        pace.learn(4, 0.01)
    assert pace.seconds(4) == 0.2


def test_the_slowest_of_them_counts() -> None:
    pace = Pace()
    for seconds in (0.01,) * 8 + (3.0,) + (0.01,) * 8:
        pace.learn(4, seconds)
    assert pace.seconds(4) > 10 * 3.0


def test_decodes_say_nothing_of_a_prompt() -> None:
    pace = Pace()
    for _ in range(100):
        pace.learn(1, 0.001)
    assert pace.seconds(512) == 51.2


def test_a_position_keeps_a_least_share() -> None:
    pace = Pace()
    for _ in range(8):
        pace.learn(500, 0.0001)
    assert pace.seconds(500) == 5.0
