"""Pinned prefixes stay, whatever comes, until they are unpinned."""

from __future__ import annotations

import pytest

from kvmanager.errors import Refusal, Refused
from kvmanager.layout import RowState, state_of
from kvmanager.pins import Pin, Pinned
from tests.unit.kvmanager.bench import Bench

SYSTEM = Pin("tenant", "system")


def pinned(bench: Bench, name: str, prompt: list[int], pin: str = "system") -> str:
    """A request that pins its prompt came, was computed and went."""
    key = bench.open(name, prompt, pin=pin)
    granted = bench.ensure(key, len(prompt))
    bench.compute(key, len(prompt))
    bench.close(key, granted.generation)
    return key


def cached(bench: Bench, prompt: list[int]) -> int:
    key = bench.open("look", prompt)
    return bench.core.cached_tokens(bench.sources[key].root, bench.output(key).tokens[: len(prompt)])


def churn(bench: Bench) -> None:
    for number in range(12):
        bench.fill(f"other {number}", [100 + number] * 8)


def test_pinned_pages_are_never_evicted() -> None:
    bench = Bench(pages=8)
    pinned(bench, "a", list(range(10)))
    churn(bench)
    assert cached(bench, list(range(10))) == 8
    assert bench.core.pins.list() == [Pinned(SYSTEM, 2)]
    assert bench.core.pages.available == 6


def test_it_is_made_as_soon_as_the_prompt_is_sealed() -> None:
    bench = Bench()
    key = bench.open("a", list(range(10)), pin="system")
    bench.ensure(key, 10)
    bench.compute(key, 7)
    bench.core.seal_all()
    assert not bench.core.pins.list()
    bench.compute(key, 8)
    bench.core.seal_all()
    assert bench.core.pins.list() == [Pinned(SYSTEM, 2)] and bench.core.check_integrity() == []


def test_a_prompt_that_was_cached_already_is_pinned_too() -> None:
    bench = Bench()
    bench.fill("a", list(range(8)))
    key = bench.open("b", list(range(8)), pin="system")
    bench.ensure(key, 9)
    bench.core.seal_all()
    assert bench.core.pins.list() == [Pinned(SYSTEM, 2)]


def test_pins_outlive_managers_and_executors_and_records() -> None:
    bench = Bench(pages=8)
    del bench.sources[pinned(bench, "a", list(range(8)))]
    bench.restart()
    bench.core.attach(b"x" * 16)
    churn(bench)
    assert bench.core.pins.list() == [Pinned(SYSTEM, 2)] and cached(bench, list(range(8))) == 8


def test_unpinned_pages_stay_cached_until_they_are_evicted() -> None:
    bench = Bench(pages=8)
    pinned(bench, "a", list(range(8)))
    assert bench.core.unpin(SYSTEM) and not bench.core.unpin(SYSTEM)
    assert bench.core.check_integrity() == [] and bench.core.pages.available == 8
    assert cached(bench, list(range(8))) == 8
    churn(bench)
    assert cached(bench, list(range(8))) == 0


def test_a_name_holds_its_newest_prefix() -> None:
    bench = Bench()
    pinned(bench, "a", list(range(8)))
    row = next(iter(bench.core.rows.pinned.values()))
    pinned(bench, "b", list(range(8)))
    assert next(iter(bench.core.rows.pinned.values())) is row  # the same prefix: nothing was done
    pinned(bench, "c", [7] * 12)
    assert bench.core.pins.list() == [Pinned(SYSTEM, 3)] and bench.core.check_integrity() == []


def test_names_are_each_tenants_own() -> None:
    assert Pin("one", "system").key != Pin("two", "system").key


def test_at_most_half_of_the_pool_is_pinned() -> None:
    bench = Bench(pages=8)
    pinned(bench, "a", list(range(8)), "one")
    pinned(bench, "b", [5] * 12, "two")
    assert [found.pin.name for found in bench.core.pins.list()] == ["one"]
    pinned(bench, "c", [6] * 8, "two")
    assert [found.pin.name for found in bench.core.pins.list()] == ["one", "two"]
    pinned(bench, "d", list(range(8)), "shares every page")
    assert len(bench.core.pins.list()) == 3


def test_what_does_not_fit_beside_the_pins_is_too_large() -> None:
    bench = Bench(pages=8)
    pinned(bench, "a", list(range(8)))
    with pytest.raises(Refused) as found:
        bench.ensure(bench.open("b", [9] * 30), 28)
    assert found.value.reason is Refusal.TOO_LARGE
    assert bench.ensure(bench.open("c", [*range(8), *[9] * 22]), 30).cached == 8


def test_short_prompts_pin_nothing() -> None:
    bench = Bench()
    pinned(bench, "a", [1, 2, 3])
    assert not bench.core.pins.list()


def test_rows_of_pins_are_not_taken_from_sequences() -> None:
    bench = Bench(rows=1, pages=60)
    for number in range(3):
        pinned(bench, f"a{number}", [number] * 4, f"pin {number}")
    states = [state_of(word) for word in bench.tables.row_word.tolist()]
    assert states[:5] == [RowState.FREE, *[RowState.PINNED] * 3, RowState.FREE]
    bench.ensure(bench.open("b", [9]), 1)


def test_with_the_prefix_cache_off_nothing_is_pinned() -> None:
    bench = Bench()
    bench.core.prefix_cache = False
    pinned(bench, "a", list(range(8)))
    assert not bench.core.pins.list()
