from __future__ import annotations

from gpu.parts.restarts import Killer, Plan


class NoStack:
    def pid(self, component: str) -> int:
        return 0


def test_a_pause_ends_with_the_silence_behind_a_kill() -> None:
    """Messages that were on their way when the executor died are no recovery."""
    killer = Killer(NoStack(), Plan())  # type: ignore[arg-type]
    killer.kills = [10.0, 20.0]
    killer.arrivals = [9.9, 10.01, 10.02, 13.5, 13.6, 20.1, 24.0]
    assert killer.pauses() == [3.5, 4.0]


def test_a_kill_without_a_token_after_it_has_no_pause() -> None:
    killer = Killer(NoStack(), Plan())  # type: ignore[arg-type]
    killer.kills, killer.arrivals = [10.0], [9.0]
    assert killer.pauses() == []
