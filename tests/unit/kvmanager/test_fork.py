"""A fork shares what is sealed, copies what is not, and may be repeated."""

from __future__ import annotations

import pytest

from kvmanager.errors import Refusal, Refused
from kvmanager.layout import PageState, state_of
from tests.unit.kvmanager.bench import Bench


def two_outputs(bench: Bench, prompt: int, computed: int | None = None) -> tuple[str, object]:
    key = bench.open("a", list(range(prompt)), outputs=3)
    parent = bench.ensure(key, prompt + 1)
    bench.compute(key, prompt if computed is None else computed)
    return key, parent


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_whole_pages_are_shared_and_the_tail_is_a_copy(prefix_cache: bool) -> None:
    bench = Bench()
    bench.core.prefix_cache = prefix_cache
    key = bench.open("a", list(range(10)), outputs=2)
    parent = bench.ensure(key, 11)
    bench.compute(key, 10)
    child = bench.fork(key, 1, parent, 10, 11)
    ours, theirs = bench.row_pages(child), bench.row_pages(parent)
    assert ours[:2] == theirs[:2] and not set(ours[2:]) & set(theirs)
    assert child.cached == 8 and child.copy is not None
    assert (child.copy.page, child.copy.tokens) == (theirs[2], 2)
    assert {state_of(bench.tables.page_word[page]) for page in ours[:2]} == {PageState.SEALED}
    assert state_of(bench.tables.page_word[theirs[2]]) == PageState.FILLING


def test_at_a_page_border_nothing_is_copied() -> None:
    bench = Bench()
    key, parent = two_outputs(bench, 8)
    child = bench.fork(key, 1, parent, 8, 9)
    assert (child.cached, child.capacity, child.copy) == (8, 12, None)


def test_a_repeated_fork_answers_the_same_row_and_the_copy_until_it_is_made() -> None:
    bench = Bench()
    key, parent = two_outputs(bench, 10)
    first = bench.fork(key, 1, parent, 10, 11)
    assert bench.fork(key, 1, parent, 10, 11) == first
    bench.restart()
    assert bench.fork(key, 1, parent, 10, 11) == first
    bench.compute(key, 10, index=1)
    again = bench.fork(key, 1, parent, 10, 11)
    assert again.generation == first.generation and again.copy is None


def test_without_the_siblings_row_there_is_no_fork() -> None:
    bench = Bench()
    key, parent = two_outputs(bench, 10)
    bench.close(key, parent.generation)
    assert bench.fork(key, 1, parent, 10, 11).generation == 0
    assert (key, 1) not in bench.core.live_rows
    bench.output(key).set_progress(0, 10)
    newer = bench.ensure(key, 11)
    assert newer.generation > parent.generation
    assert bench.fork(key, 1, parent, 10, 11).generation == 0


def test_a_fork_that_was_made_outlives_its_sibling() -> None:
    bench = Bench()
    key, parent = two_outputs(bench, 10)
    child = bench.fork(key, 1, parent, 10, 11)
    bench.close(key, parent.generation)
    again = bench.fork(key, 1, parent, 10, 11)
    assert (again.generation, again.copy) == (child.generation, None)
    assert bench.row_pages(child)[:2] == bench.row_pages(again)[:2]


def test_what_the_sibling_has_not_computed_is_not_forked() -> None:
    bench = Bench()
    key, parent = two_outputs(bench, 10, computed=7)
    assert bench.fork(key, 1, parent, 10, 11).generation == 0 and (key, 1) not in bench.core.live_rows
    assert bench.fork(key, 1, parent, 7, 8).cached == 4


def test_a_fork_that_was_made_is_answered_whatever_its_sibling_gave_up_since() -> None:
    bench = Bench()
    key, parent = two_outputs(bench, 10)
    child = bench.fork(key, 1, parent, 10, 11)
    bench.output(key).set_progress(0, 10)  # as before a preemption, whose `close` is on its way
    again = bench.fork(key, 1, parent, 10, 11)
    assert (again.generation, again.copy) == (child.generation, None)


def test_other_tokens_are_not_forked() -> None:
    bench = Bench()
    key, parent = two_outputs(bench, 10)
    bench.compute(key, 12)
    bench.output(key, 0).tokens[10:12] = 7
    bench.output(key, 1).tokens[10:12] = 8
    bench.output(key, 1).set_progress(0, 12)
    with pytest.raises(Refused) as found:
        bench.fork(key, 1, parent, 12, 13)
    assert found.value.reason is Refusal.INVALID
    assert bench.fork(key, 1, parent, 10, 13).cached == 8


def test_a_fork_finds_no_pages() -> None:
    bench = Bench(pages=4)
    key = bench.open("a", list(range(10)), outputs=2)
    parent = bench.ensure(key, 13)
    bench.compute(key, 10)
    with pytest.raises(Refused) as found:
        bench.core.fork(key, 1, 0, parent.generation, 10, 11, 0, 0)
    assert found.value.reason is Refusal.NO_PAGES
    assert bench.core.check_integrity() == [] and (key, 1) not in bench.core.live_rows


def test_eight_outputs_hold_one_prompt() -> None:
    """512 tokens of prompt and 64 new ones in pages of 16 come to 32 + 8 x 4 pages; here 128 and 16 in pages of 4."""
    bench = Bench(pages=400, rows=8, entries=40)
    key = bench.open("a", list(range(128)), max_tokens=16, outputs=8)
    parent = bench.ensure(key, 128)
    bench.compute(key, 128)
    rows = [parent, *(bench.fork(key, index, parent, 128, 129) for index in range(1, 8))]
    bench.grow([(row, 144) for row in rows])
    assert bench.core.pages.usable - bench.core.pages.available == 32 + 8 * 4
    bench.core.close_all(key)
    assert bench.core.pages.available == bench.core.pages.usable and bench.core.check_integrity() == []


def test_a_row_that_was_made_for_another_length_takes_no_copy() -> None:
    bench = Bench()
    key, parent = two_outputs(bench, 10)
    assert bench.fork(key, 1, parent, 6, 11).cached == 4
    assert bench.fork(key, 1, parent, 10, 11).copy is None
