"""Dead children come back at once, unless they die again and again and nothing gets done."""

from __future__ import annotations

from services.supervisor.policy import RestartPolicy


def test_at_once_twice_then_longer_and_longer() -> None:
    policy = RestartPolicy()
    assert [policy.delay(second, None) for second in range(8)] == [0, 0, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0]


def test_committed_tokens_make_it_hopeful_again() -> None:
    policy = RestartPolicy()
    delays = [policy.delay(second, (1, second)) for second in range(20)]
    assert delays == [0.0] * 20


def test_rare_deaths_are_answered_at_once() -> None:
    policy = RestartPolicy()
    assert [policy.delay(second, None) for second in range(0, 200, 20)] == [0.0] * 10
