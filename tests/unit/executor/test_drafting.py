"""How many drafts a sequence may try: more while they are right, a rest while they are not."""

from __future__ import annotations

from services.executor.drafting import Drafting

MOST = 15


def test_right_ones_double_it_up_to_the_most() -> None:
    drafting = Drafting()
    drafting.allowed = 3
    seen = []
    for _ in range(5):
        drafting.learn(100, drafting.allowed, drafting.allowed, MOST)
        seen.append(drafting.allowed)
    assert seen == [6, 12, 15, 15, 15]
    assert drafting.resumes_at == 0


def test_fewer_than_allowed_that_are_right_take_nothing_away() -> None:
    drafting = Drafting()
    drafting.allowed = 3
    drafting.learn(100, 3, 3, MOST)
    drafting.learn(101, 1, 1, MOST)
    assert drafting.allowed == 6


def test_what_was_right_and_one_more() -> None:
    drafting = Drafting()
    drafting.allowed = 12
    drafting.learn(100, 12, 4, MOST)
    assert (drafting.allowed, drafting.resumes_at) == (5, 0)


def test_rests_double_and_end_with_a_draft_that_is_right() -> None:
    drafting = Drafting()
    rests = []
    for _ in range(8):
        drafting.learn(100, drafting.allowed, 0, MOST)
        rests.append(drafting.resumes_at - 100)
    assert rests == [-100, 2, 6, 14, 30, 62, 62, 62]  # the first time none
    assert drafting.allowed == 1
    drafting.learn(200, 1, 1, MOST)
    drafting.learn(300, 2, 0, MOST)
    assert drafting.resumes_at < 300
    drafting.learn(301, 1, 0, MOST)
    assert drafting.resumes_at == 303
