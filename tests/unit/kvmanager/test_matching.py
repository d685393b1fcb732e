"""Partial hits: the page that goes on like the prompt does, for a while, is copied."""

from __future__ import annotations

from kvmanager.matching import PageCopy
from tests.unit.kvmanager.bench import Bench


def copied(bench: Bench, name: str, prompt: list[int], salt: str = "") -> tuple[int, int]:
    """Tokens shared in whole pages, and tokens to copy."""
    granted = bench.ensure(bench.open(name, prompt, salt=salt), len(prompt))
    return granted.cached, granted.copy.tokens if granted.copy is not None else 0


def test_the_page_with_the_longest_common_start_is_copied() -> None:
    bench = Bench()
    bench.fill("a", [0, 1, 2, 3, 4, 5, 90, 91])
    bench.fill("b", [0, 1, 2, 3, 4, 5, 6, 92])
    assert copied(bench, "c", [0, 1, 2, 3, 4, 5, 6, 7, 8]) == (4, 3)
    assert copied(bench, "d", [0, 1, 2, 3, 4, 5, 7]) == (4, 2)
    assert copied(bench, "e", [0, 1, 7]) == (0, 2)
    assert copied(bench, "f", [0, 1, 2, 3, 99]) == (4, 0)


def test_the_last_tokens_of_a_prompt_may_all_be_copied() -> None:
    bench = Bench()
    bench.fill("a", list(range(12)))
    assert copied(bench, "b", list(range(11))) == (8, 3)


def test_the_source_is_named_with_its_generation() -> None:
    bench = Bench(pages=3)
    for name in "ab":  # the second takes the pages of the first
        bench.fill(name, [ord(name)] * 12)
    granted = bench.ensure(bench.open("c", [98, 98, 1]), 3)
    assert granted.copy is not None and granted.copy.generation == 2


def test_a_source_that_gave_way_is_not_named() -> None:
    bench = Bench(pages=2)
    bench.fill("a", [5] * 8)
    first = bench.ensure(bench.open("b", [5, 5, 5, 5, 5, 5, 1]), 7)
    assert first.cached == 4 and first.copy is None
    assert bench.core.hit_tokens == 4


def test_salts_and_histories_are_kept_apart() -> None:
    bench = Bench()
    bench.fill("a", [1, 2, 3, 4], salt="one")
    assert copied(bench, "b", [1, 2, 3], salt="two") == (0, 0)
    bench.fill("c", [9, 9, 9, 9, 1, 2, 3, 4], salt="two")
    assert copied(bench, "d", [1, 2, 3], salt="two") == (0, 0)


def test_a_repeated_ensure_names_the_copy_until_something_is_computed() -> None:
    bench = Bench()
    bench.fill("a", list(range(8)))
    key = bench.open("b", [0, 1, 2, 3, 4, 5, 77])
    first = bench.ensure(key, 7)
    assert isinstance(first.copy, PageCopy) and first.copy.tokens == 2
    assert bench.ensure(key, 7) == first
    bench.restart()
    assert bench.ensure(key, 7) == first
    bench.compute(key, 6)
    assert bench.ensure(key, 7).copy is None


def test_hits_are_counted_in_tokens() -> None:
    bench = Bench()
    bench.fill("a", list(range(8)))
    before = bench.core.query_tokens
    copied(bench, "b", [0, 1, 2, 3, 4, 5, 77])
    assert bench.core.hit_tokens == 6 and bench.core.query_tokens == before + 7


def test_without_the_prefix_cache_nothing_is_copied() -> None:
    bench = Bench()
    bench.fill("a", list(range(8)))
    bench.core.prefix_cache = False
    assert copied(bench, "b", [0, 1, 2]) == (0, 0)


def test_an_evicted_page_is_no_source_and_its_twin_takes_its_place() -> None:
    bench = Bench(pages=4)
    keys = [bench.open(name, [0, 1, 2, 3]) for name in "ab"]
    rows = [bench.ensure(key, 4) for key in keys]
    newer = bench.row_pages(rows[1])
    for key, row in zip(keys, rows, strict=True):
        bench.compute(key, 4)
        bench.close(key, row.generation)
    bench.ensure(bench.open("c", [9] * 12), 12)  # both free pages, and the older twin
    (left,) = (pages for pages in bench.core.pages.index.children_snapshot().values())
    assert left == tuple(newer)
