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


def test_what_was_right_makes_more_likely_right() -> None:
    drafting = Drafting()
    seen = []
    for number in range(6):
        tried = max(drafting.likely, 1)
        drafting.learn(100 + number, tried, tried, MOST)
        seen.append(drafting.likely)
    assert seen == sorted(seen) and seen[0] == 1 and seen[-1] == MOST
    drafting.learn(200, 15, 6, MOST)
    assert 1 < drafting.likely < MOST


def test_of_drafts_that_are_right_every_other_time_none_is_likely() -> None:
    drafting = Drafting()
    for number in range(20):
        drafting.learn(100 + number, 1, number % 2, MOST)
    assert drafting.likely == 0


def test_single_drafts_come_rarer_and_rarer_while_none_is_likely() -> None:
    drafting = Drafting()
    assert drafting.probes_at == 0
    pauses = []
    for _ in range(7):
        drafting.learn(100, 1, 0, MOST)
        pauses.append(drafting.probes_at - 100)
    assert pauses == [8, 16, 32, 64, 128, 128, 128]
    for _ in range(4):
        drafting.learn(100, 3, 3, MOST)
    assert drafting.likely > 0
    while drafting.likely:
        drafting.learn(100, 1, 0, MOST)
    assert drafting.probes_at == 108
