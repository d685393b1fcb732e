"""Many rows grow in one call."""

from __future__ import annotations

import numpy as np
import pytest

from kvmanager.allocation import share_out
from kvmanager.core import Granted
from kvmanager.errors import Refusal, Refused
from tests.unit.kvmanager.bench import Bench


def rows_of(bench: Bench, count: int) -> list[Granted]:
    return [bench.ensure(bench.open(str(number), [number] * 4), 4) for number in range(count)]


def test_each_row_gets_its_own_pages_behind_its_old_ones() -> None:
    bench = Bench(pages=30)
    rows = rows_of(bench, 4)
    before = [bench.row_pages(row) for row in rows]
    assert bench.grow([(rows[2], 5), (rows[0], 16), (rows[1], 4)], headroom=4) == [12, 20, 8]
    after = [bench.row_pages(row) for row in rows]
    assert [len(pages) for pages in after] == [5, 2, 3, 1]
    assert all(now[: len(then)] == then for now, then in zip(after, before, strict=True))
    named = [page for pages in after for page in pages]
    assert len(set(named)) == len(named)


def test_repeating_it_changes_nothing() -> None:
    bench = Bench(pages=30)
    rows = rows_of(bench, 3)
    wants = [(row, 12) for row in rows]
    assert bench.grow(wants) == [12, 12, 12]
    before = bytes(bench.tables._buffer)
    assert bench.grow(wants) == [12, 12, 12]
    assert bytes(bench.tables._buffer) == before


def test_rows_in_front_are_served_first() -> None:
    bench = Bench(pages=5)
    rows = rows_of(bench, 3)
    assert bench.grow([(rows[1], 8), (rows[0], 8), (rows[2], 8)]) == [8, 8, 4]


def test_headroom_stays_above_the_watermark_and_never_costs_a_need() -> None:
    bench = Bench(pages=6)
    rows = rows_of(bench, 3)
    assert bench.grow([(rows[0], 8), (rows[1], 8)], headroom=4) == [8, 8]
    assert bench.core.pages.available == 1
    assert bench.grow([(rows[2], 8)], headroom=4) == [8]


def test_a_row_that_is_gone_is_told_so_and_the_others_grow() -> None:
    bench = Bench(pages=20)
    rows = rows_of(bench, 3)
    bench.close(bench.open("1", [1] * 4), rows[1].generation)
    assert bench.grow([(row, 8) for row in rows]) == [8, 0, 8]


def test_a_place_that_another_row_has_now_is_left_alone() -> None:
    bench = Bench(pages=20, rows=1)
    old = bench.ensure(bench.open("a", [1] * 4), 4)
    bench.close(bench.open("a", [1] * 4), old.generation)
    new = bench.ensure(bench.open("b", [2] * 4), 4)
    assert new.row == old.row
    assert bench.grow([(old, 20)]) == [0]
    assert len(bench.row_pages(new)) == 1


def test_a_row_named_twice_or_of_a_pin_is_refused() -> None:
    bench = Bench(pages=20)
    (row,) = rows_of(bench, 1)
    for wants in ([(row, 8), (row, 12)], [(Granted(bench.tables.rows, 1, 0, 0), 8)]):
        with pytest.raises(Refused) as found:
            bench.grow(wants)
        assert found.value.reason is Refusal.INVALID
    assert len(bench.row_pages(row)) == 1


def test_no_row_is_longer_than_a_row_can_be() -> None:
    bench = Bench(pages=40, entries=4)
    (row,) = rows_of(bench, 1)
    assert bench.grow([(row, 400)], headroom=100) == [16]


def test_where_memory_ends_the_pool_ends() -> None:
    bench = Bench(pages=20, back=lambda page: min(page + 1, 6))
    rows = rows_of(bench, 3)
    assert bench.grow([(row, 8) for row in rows], headroom=8) == [8, 8, 4]
    assert bench.core.pages.usable == 5


def test_pages_filled_by_a_row_that_grew_are_sealed() -> None:
    bench = Bench(pages=20)
    rows = rows_of(bench, 1)
    key = bench.open("0", [0] * 4)
    bench.core.seal_all()
    bench.grow([(rows[0], 12)])
    bench.compute(key, 9)
    assert bench.core.seal_all() == 2


def test_sharing_out_is_all_or_nothing_for_each_row() -> None:
    def shared(needs: list[int], wishes: list[int], available: int, watermark: int = 1) -> list[int]:
        return share_out(np.array(needs), np.array(wishes), available, watermark).tolist()

    assert shared([1, 2, 1], [2, 2, 2], 20) == [3, 4, 3]
    assert shared([1, 2, 1], [2, 2, 2], 7) == [3, 2, 1]
    assert shared([1, 2, 1], [2, 2, 2], 4) == [1, 2, 1]
    assert shared([1, 2, 1], [2, 2, 2], 2) == [1, 0, 0]
    assert shared([3, 1], [0, 0], 2) == [0, 0]
    assert shared([], [], 5) == []


def test_a_place_that_is_used_again_leaves_no_trace_of_the_row_before() -> None:
    bench = Bench(rows=1)
    for number in range(3):
        key = bench.open(str(number), [number] * 9)
        bench.close(key, bench.ensure(key, 9).generation)
    key = bench.open("last", [1] * 9)
    bench.ensure(key, 9)
    bench.compute(key, 9)
    with pytest.raises(Refused):  # there is but one row, yet looking for a match seals
        bench.ensure(bench.open("like it", [1] * 9), 9)
    assert len(bench.core.pages.index.snapshot()) == 2
