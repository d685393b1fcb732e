"""A missed deadline is a hang only after a second of looking at it."""

from __future__ import annotations

from services.supervisor.hang import HangWatch


def looks(watch: HangWatch, *seen: tuple[float, int]) -> list[bool]:
    """seen: at which second, and which deadline was missed then."""
    return [watch.look(now, missed) for now, missed in seen]


def test_a_deadline_missed_for_a_second_is_a_hang() -> None:
    seen = [(tenth / 10, 7) for tenth in range(13)]
    assert looks(HangWatch(), *seen).index(True) in (10, 11)


def test_whoever_gets_on_does_not_hang() -> None:
    # Each turn ends too late, but it ends; or the component is idle in between.
    assert not any(looks(HangWatch(), *((tenth / 10, 7 + tenth // 9) for tenth in range(60))))
    assert not any(looks(HangWatch(), *((tenth / 10, 7 * bool(tenth % 9)) for tenth in range(60))))


def test_a_process_that_gives_way_has_more_time() -> None:
    """It may be without a processor for seconds, and loads nevertheless; stopped, it is found as well."""
    watch, late = HangWatch(), HangWatch()
    looks_low = [watch.look(tenth / 10, 7, is_low=True) for tenth in range(210)]
    assert looks_low.index(True) in (200, 201)
    assert not late.look(0, 7, is_low=True) and not late.look(0.1, 7, is_low=True)
    assert any(late.look(0.2 + tenth / 10, 7) for tenth in range(12)), "as soon as it need not give way any more"


def test_time_that_the_supervisor_did_not_see_does_not_count() -> None:
    # It is stopped for an hour, together with its children; they have a second to get on.
    assert not any(looks(HangWatch(), (0, 0), (0.1, 0), (3600, 7), (3600.1, 7), (3600.5, 7), (3600.6, 0)))
    # Stopped again and again, it still finds a hang.
    assert looks(HangWatch(), *((3600.0 * hour, 7) for hour in range(6))).index(True) == 4
