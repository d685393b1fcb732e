"""Edge cases of each call."""

from __future__ import annotations

import pytest

from kvmanager.errors import Refusal, Refused
from kvmanager.layout import Header, PageState, RowState, state_of
from tests.unit.kvmanager.bench import PAGE_SIZE, Bench


def refusal(found: pytest.ExceptionInfo[Refused]) -> Refusal:
    return found.value.reason


def test_a_full_hit_at_a_page_border_shares_every_page() -> None:
    bench = Bench()
    bench.fill("a", list(range(8)))
    key = bench.open("b", list(range(8)))
    assert bench.core.cached_tokens(bench.sources[key].root, bench.output(key).tokens[:8]) == 8
    granted = bench.ensure(key, 8)
    assert (granted.cached, granted.capacity) == (8, 8)


def test_only_whole_pages_below_known_are_shared() -> None:
    bench = Bench()
    bench.fill("a", list(range(12)))
    assert bench.ensure(bench.open("b", list(range(11))), 11).cached == 8
    assert bench.ensure(bench.open("c", [0, 1, 2]), 3).cached == 0
    assert bench.ensure(bench.open("d", [0, 1, 2, 3, 9, 5, 6, 7]), 8).cached == 4


def test_pages_being_filled_are_shared_as_soon_as_they_are_full() -> None:
    bench = Bench()
    first = bench.open("a", list(range(9)))
    bench.ensure(first, 9)
    bench.compute(first, 7)
    assert bench.ensure(bench.open("b", list(range(9))), 9).cached == 4
    bench.compute(first, 9)
    assert bench.ensure(bench.open("c", list(range(9))), 9).cached == 8


def test_salt_and_cache_switch_keep_prefixes_apart() -> None:
    bench = Bench()
    bench.fill("a", list(range(8)), salt="one")
    assert bench.ensure(bench.open("b", list(range(8)), salt="two"), 8).cached == 0
    bench.core.prefix_cache = False
    assert bench.ensure(bench.open("c", list(range(8)), salt="one"), 8).cached == 0


def test_a_hash_that_lies_is_not_believed() -> None:
    bench = Bench()
    bench.fill("a", list(range(8)))
    key = bench.open("b", list(range(8)))
    second = bench.core.pages.index.get(list(bench.core.pages.index.snapshot())[1])
    assert second is not None
    bench.tables.page_tokens[second, 2] += 1
    assert bench.core.ensure(key, 0, 8, 0, 0).cached == 4


def test_of_equal_pages_the_lowest_is_found_and_the_next_takes_its_place() -> None:
    bench = Bench(pages=4)
    one, two = bench.open("a", list(range(4))), bench.open("b", list(range(4)))
    rows = [bench.ensure(key, 4) for key in (one, two)]
    for key in (one, two):
        bench.compute(key, 4)
    bench.core.seal_all()
    (twins,) = bench.core.pages.index.snapshot().values()
    assert twins == tuple(sorted(bench.row_pages(rows[0]) + bench.row_pages(rows[1])))
    for key, granted in zip((one, two), rows, strict=True):
        bench.close(key, granted.generation)
    third = bench.open("c", [9] * 12)
    bench.ensure(third, 12)  # two free pages, and the older of the twins
    (left,) = bench.core.pages.index.snapshot().values()
    first_used = bench.row_pages(rows[0])[0]
    assert left == tuple(page for page in twins if page != first_used)


def test_no_pages_changes_nothing_not_even_a_row() -> None:
    bench = Bench(pages=4)
    bench.fill("a", list(range(8)))
    holder = bench.open("b", [7] * 8)
    bench.ensure(holder, 8)
    before = bytes(bench.tables._buffer)
    key = bench.open("c", list(range(8)) + [5] * 8)
    with pytest.raises(Refused) as found:
        bench.core.ensure(key, 0, 16, 0, 0)
    assert refusal(found) is Refusal.NO_PAGES
    assert bytes(bench.tables._buffer) == before and bench.core.check_integrity() == []


def test_matched_pages_are_not_counted_as_free_for_their_own_row() -> None:
    bench = Bench(pages=3)
    bench.fill("a", list(range(8)))
    granted = bench.ensure(bench.open("b", [*range(8), 1]), 9)
    assert granted.cached == 8 and len(set(bench.row_pages(granted))) == 3


def test_the_need_takes_the_last_page_and_headroom_stays_above_the_watermark() -> None:
    bench = Bench(pages=5)
    assert bench.ensure(bench.open("a", [1]), 16, headroom=8).capacity == 16
    assert bench.core.pages.available == 1
    assert bench.ensure(bench.open("b", [2]), 4, headroom=8).capacity == 4
    assert bench.core.pages.available == 0


def test_keep_free_refuses_the_need() -> None:
    bench = Bench(pages=5)
    key = bench.open("a", [1])
    with pytest.raises(Refused) as found:
        bench.ensure(key, 16, keep_free=2)
    assert refusal(found) is Refusal.NO_PAGES
    assert bench.ensure(key, 12, headroom=16, keep_free=2).capacity == 12


def test_what_can_never_fit_is_too_large() -> None:
    bench = Bench(pages=4)
    with pytest.raises(Refused) as found:
        bench.ensure(bench.open("a", [1], max_tokens=60), 17)
    assert refusal(found) is Refusal.TOO_LARGE


def test_a_row_is_never_made_longer_than_its_log() -> None:
    bench = Bench()
    key = bench.open("a", [1] * 5, max_tokens=2)
    assert bench.ensure(key, 60, headroom=100).capacity == 8


def test_repeated_first_ensure_answers_the_same_row() -> None:
    bench = Bench()
    key = bench.open("a", list(range(6)))
    first = bench.ensure(key, 6)
    again = bench.ensure(key, 6)
    assert (again.row, again.generation) == (first.row, first.generation)
    assert len(bench.core.live_rows) == 1


def test_calls_about_an_older_row_are_done_and_change_nothing() -> None:
    bench = Bench()
    key = bench.open("a", list(range(6)))
    old = bench.ensure(key, 6)
    bench.close(key, old.generation)
    assert bench.grow([(old, 6)]) == [0]
    assert not bench.core.live_rows
    new = bench.ensure(key, 6)
    assert new.generation > old.generation
    bench.close(key, old.generation)
    bench.core.trim(key, 0, old.generation, 0)
    assert bench.grow([(old, 30)]) == [0]
    assert int(bench.tables.row_length[new.row]) * PAGE_SIZE == new.capacity
    with pytest.raises(Refused) as found:
        bench.core.close(key, 0, new.generation + 1)
    assert refusal(found) is Refusal.INVALID


def test_a_repeated_first_ensure_says_again_what_was_shared() -> None:
    bench = Bench()
    bench.fill("a", list(range(8)))
    key = bench.open("b", list(range(10)))
    assert bench.ensure(key, 10).cached == 8
    assert bench.ensure(key, 10).cached == 8


def test_row_generations_grow_over_all_rows_and_restarts() -> None:
    bench = Bench(rows=2)
    a, b = bench.open("a", [1]), bench.open("b", [2])
    first = bench.ensure(a, 1)
    bench.close(a, first.generation)
    second = bench.ensure(b, 1)
    bench.restart()
    assert bench.ensure(a, 1).generation > second.generation > first.generation


def test_no_rows() -> None:
    bench = Bench(rows=1)
    bench.ensure(bench.open("a", [1]), 1)
    with pytest.raises(Refused) as found:
        bench.ensure(bench.open("b", [1]), 1)
    assert refusal(found) is Refusal.NO_ROWS


def test_unknown_records_and_outputs_are_not_found() -> None:
    bench = Bench()
    key = bench.open("a", [1])
    for wrong_key, index in (("00" * 16, 0), (key, 1)):
        with pytest.raises(Refused) as found:
            bench.ensure(wrong_key, 1, index=index)
        assert refusal(found) is Refusal.NOT_FOUND


def test_a_new_row_is_refused_while_progress_claims_what_no_page_holds() -> None:
    bench = Bench()
    key = bench.open("a", list(range(6)))
    bench.compute(key, 4)
    with pytest.raises(Refused) as found:
        bench.ensure(key, 6)
    assert refusal(found) is Refusal.INVALID


def test_trim_keeps_every_page_with_a_computed_token() -> None:
    bench = Bench()
    key = bench.open("a", list(range(6)))
    granted = bench.ensure(key, 6, headroom=12)
    assert granted.capacity == 20
    bench.compute(key, 5)
    bench.core.trim(key, 0, granted.generation, 0)
    assert int(bench.tables.row_length[granted.row]) == 2
    assert bench.core.check_integrity() == [] and bench.core.pages.available == 18


def test_outputs_of_a_request_have_rows_of_their_own() -> None:
    bench = Bench()
    key = bench.open("a", list(range(5)), outputs=3)
    rows = {bench.ensure(key, 5, index=index).row for index in range(3)}
    assert len(rows) == 3
    bench.core.close_all(key)
    assert not bench.core.has_rows(key) and bench.core.check_integrity() == []


def test_the_tail_of_a_chain_is_given_up_first_and_what_was_used_last_stays() -> None:
    bench = Bench(pages=6)
    bench.fill("a", list(range(12)))
    bench.fill("b", [7] * 12)
    bench.restart()
    bench.fill("a again", list(range(8)))  # the first two pages of a are newer than all of b
    bench.ensure(bench.open("c", [8] * 8), 8)  # takes a's tail, then b's

    def cached(prompt: list[int]) -> int:
        key = bench.open("look", prompt)
        return bench.core.cached_tokens(bench.sources[key].root, bench.output(key).tokens[: len(prompt)])

    assert cached(list(range(12))) == 8
    assert cached([7] * 12) == 8


def test_pages_in_rows_are_never_evicted() -> None:
    bench = Bench(pages=4)
    bench.fill("a", list(range(8)))
    held = bench.row_pages(bench.ensure(bench.open("b", list(range(8))), 8))
    other = bench.row_pages(bench.ensure(bench.open("c", [9] * 8), 8))
    assert not set(held) & set(other)


def test_reuse_counts_the_generation_of_a_page() -> None:
    bench = Bench(pages=1)
    words = []
    for name in "abc":
        bench.fill(name, [ord(name)] * 4)
        words.append(int(bench.tables.page_word[1]))
    assert [word >> 32 for word in words] == [1, 2, 3]
    assert {state_of(word) for word in words} == {PageState.SEALED}


def test_epochs_belong_to_executors() -> None:
    bench = Bench()
    assert bench.core.attach(b"a" * 16) == 1
    assert bench.core.attach(b"a" * 16) == 1
    bench.restart()
    assert bench.core.attach(b"a" * 16) == 1
    assert bench.core.attach(b"b" * 16) == 2
    assert int(bench.tables.header[Header.EPOCH]) == 2


def test_a_new_epoch_frees_the_rows_of_records_that_are_gone() -> None:
    bench = Bench()
    bench.core.attach(b"a" * 16)
    kept, lost = bench.open("kept", [1]), bench.open("lost", [2])
    bench.ensure(kept, 1)
    row = bench.ensure(lost, 1)
    del bench.sources[lost]
    bench.restart()
    bench.core.attach(b"a" * 16)
    assert state_of(bench.tables.row_word[row.row]) == RowState.LIVE  # its executor may still write
    bench.core.attach(b"b" * 16)
    assert list(bench.core.live_rows) == [(kept, 0)] and bench.core.check_integrity() == []


def test_where_memory_ends_the_pool_ends_until_there_is_more() -> None:
    most = 6
    bench = Bench(pages=20, back=lambda page: min(page + 1, most))
    assert bench.ensure(bench.open("a", [1]), 12).capacity == 12
    with pytest.raises(Refused) as found:
        bench.ensure(bench.open("b", [2]), 12)
    assert refusal(found) is Refusal.NO_PAGES
    assert bench.core.pages.usable == 5
    large = bench.open("c", [3])
    for _ in range(2):
        with pytest.raises(Refused) as found:
            bench.ensure(large, 24)
        assert refusal(found) is Refusal.NO_PAGES  # it was opened when there seemed to be room: it waits
        bench.core.pages.regrow()
        assert bench.core.pages.usable == 5
    assert bench.ensure(bench.open("d", [4]), 8).capacity == 8
    most = 20
    bench.core.pages.regrow()
    assert bench.core.pages.usable == 20 and bench.core.check_integrity() == []
    assert bench.ensure(large, 24).capacity == 24


def test_a_pool_that_has_no_memory_at_all_yet_grows_without_the_reserved_page() -> None:
    most = 0
    bench = Bench(pages=20, back=lambda page: min(page + 1, most))
    key = bench.open("a", [1])
    with pytest.raises(Refused) as found:
        bench.ensure(key, 12)
    assert refusal(found) is Refusal.NO_PAGES
    most = 21
    bench.core.pages.regrow()
    assert bench.ensure(key, 44).capacity == 44
    assert bench.core.check_integrity() == [] and bench.core.pages.usable == 20


@pytest.mark.parametrize("array", ["row_entry", "page_word", "page_hash", "row_key", "page_used"])
def test_integrity_sees_a_word_that_changed_by_itself(array: str) -> None:
    bench = Bench()
    bench.fill("a", list(range(8)))
    key = bench.open("b", list(range(8)))
    granted = bench.ensure(key, 9)
    bench.compute(key, 8)
    page = bench.row_pages(granted)[0]
    words = getattr(bench.tables, array)
    bench.core.check_integrity()
    words[granted.row if array.startswith("row") else page] += 1 << 33
    assert bench.core.check_integrity() != []
