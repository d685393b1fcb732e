"""What is chosen next: seeded, and so that every row of the matrix fills up."""

from __future__ import annotations

from collections import Counter

import pytest

from services.torture.faults import ANYWHERE, EVERYTHING, STANDBY, Action, Chooser, Only, Row, Trigger, rows

POINTS = ("executor.commit.before", "executor.adopt.before", "kvmanager.seal.before_word", "frontend.write.before")


def chooser(seed: int = 1, only: str = "", standby: bool = True, counts: Counter[Row] | None = None) -> Chooser:
    return Chooser(seed, POINTS, counts or Counter(), Only.parse(only), standby)


def test_the_same_seed_draws_the_same() -> None:
    first, second, other = chooser(3), chooser(3), chooser(4)
    plans = [first.draw() for _ in range(50)]
    assert plans == [second.draw() for _ in range(50)]
    assert plans != [other.draw() for _ in range(50)]


def test_every_point_has_a_row_for_each_action() -> None:
    assert {row.action for row in rows(POINTS) if row.point == POINTS[0]} == {Action.KILL, Action.STOP, Action.ERROR}
    assert Row(EVERYTHING, ANYWHERE, Action.KILL) in rows(POINTS)


def test_rows_fill_up() -> None:
    drawn, one = Counter[Row](), chooser()
    for _ in range(400):
        row = one.draw().fault.row
        drawn[row] += 1
        one.done(row)
    assert set(drawn) == set(rows(POINTS))


def test_a_row_without_trials_comes_before_those_that_have_some() -> None:
    rare = Row("executor", POINTS[0], Action.STOP)
    counts = Counter({row: 10 for row in rows(POINTS) if row != rare})
    assert rare in [chooser(seed, counts=counts).draw().fault.row for seed in range(10)]


def test_what_is_never_reached_does_not_take_all_the_time() -> None:
    counts = Counter(dict.fromkeys(rows(POINTS), 2))
    never = Row("kvmanager", POINTS[2], Action.KILL)
    del counts[never]
    one, drawn = chooser(counts=counts), 0
    for _ in range(200):
        row = one.draw().fault.row
        drawn += row == never
        (one.missed if row == never else one.done)(row)
    assert 0 < drawn < 50


@pytest.mark.parametrize(
    ("only", "fits"),
    [
        ("executor", lambda row: row.component == "executor"),
        ("executor:executor.commit.before", lambda row: row.point == POINTS[0]),
        ("executor:executor.commit.before:stop", lambda row: row == Row("executor", POINTS[0], Action.STOP)),
        ("::kill", lambda row: row.action is Action.KILL),
    ],
)
def test_a_run_is_held_to_what_was_named(only: str, fits: object) -> None:
    assert callable(fits)
    one = chooser(only=only)
    assert all(fits(one.draw().fault.row) for _ in range(50))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no fault of that name"):
        chooser(only="executor:executor.nowhere")


def test_without_a_standby_none_is_killed() -> None:
    one = chooser(standby=False)
    assert all(one.draw().fault.row.component != STANDBY for _ in range(200))


def test_what_comes_at_the_start_only_is_brought_about_by_a_death() -> None:
    one = chooser(only="executor:executor.adopt.before")
    assert all(one.draw().fault.trigger is Trigger.START for _ in range(20))
