"""Damage of every kind, planted by hand in tables and in derived state: each is found, and named for what it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvmanager.core import Granted
from kvmanager.findings import FindingKind
from kvmanager.integrity import check_steps
from kvmanager.layout import NO_PAGE, PageState, RowState, page_word, progress_word, row_word
from kvmanager.prefix import page_hash
from kvmanager.stored import STEP_PAGES, check_tables
from tests.unit.kvmanager.bench import PAGE_SIZE, Bench

Damage = Callable[["Scene"], object]


class Scene(Bench):
    """Two live rows over a shared prefix, a pinned one, cached and free pages."""

    def __init__(self) -> None:
        super().__init__(pages=20, rows=6)
        self.fill("past", [7] * 8)
        self.keys = [self.open(name, [*range(8), 50 + number]) for number, name in enumerate("ab")]
        self.granted: list[Granted] = []
        for key in self.keys:
            self.granted.append(self.ensure(key, 12))
            self.compute(key, 9)
            self.core.seal_all()
        pinning = self.open("pinned", list(range(30, 39)), pin="system")
        granted = self.ensure(pinning, 9)
        self.compute(pinning, 9)
        self.close(pinning, granted.generation)
        assert self.kinds() == []

    def kinds(self) -> list[FindingKind]:
        """Without doubles, in the order found."""
        found = [finding for step in check_steps(self.core, orphans=True) for finding in step]
        assert all(str(finding) for finding in found)
        return list(dict.fromkeys(finding.kind for finding in found))

    @property
    def row(self) -> int:
        return self.granted[0].row

    def page(self, place: int, which: int = 0) -> int:
        return self.row_pages(self.granted[which])[place]

    @property
    def pinned_row(self) -> int:
        return int(np.flatnonzero(self.tables.row_word & np.uint64(0xFF) == RowState.PINNED)[0])

    @property
    def free_page(self) -> int:
        return self.core.pages.free[0]

    def set_entry(self, place: int, page: int, row: int | None = None) -> None:
        """Names the page in its present generation."""
        generation = int(self.tables.page_word[page]) >> 32
        self.tables.row_entry[self.row if row is None else row, place] = page | generation << 32

    def store(self, array: str, index: object, value: object) -> None:
        getattr(self.tables, array)[index] = value


def generation(scene: Scene, page: int) -> int:
    return int(scene.tables.page_word[page]) >> 32


def with_other_tokens(scene: Scene) -> None:
    """A page whose hash is right for its tokens, which are not those of its row."""
    page = scene.page(1)
    tokens = np.full(PAGE_SIZE, 99, np.uint32)
    scene.tables.page_tokens[page] = tokens
    content = page_hash(scene.tables.page_parent[page].tobytes(), tokens)
    scene.tables.page_hash[page] = np.frombuffer(content, np.uint64)


def sealed_behind(scene: Scene) -> None:
    """The last page of the row is sealed while its second is being filled."""
    page = scene.page(1)
    scene.tables.page_word[page] = page_word(PageState.FILLING, generation(scene, page))
    scene.set_entry(2, scene.page(0))


def forget_tokens(scene: Scene) -> None:
    """A page of generated tokens is sealed, and then they count as not known."""
    scene.grow([(scene.granted[0], 16)])
    scene.compute(scene.keys[0], 12)
    scene.core.seal_all()
    scene.output(scene.keys[0]).set_progress(0, 9)


def set_twin(scene: Scene) -> None:
    scene.tables.row_key[scene.granted[1].row] = scene.tables.row_key[scene.row]


STORED: dict[str, tuple[Damage, FindingKind]] = {
    "a page that is being filled in two rows": (
        lambda scene: scene.set_entry(2, scene.page(2, 1)),
        FindingKind.DOUBLE_OWNED,
    ),
    "an entry of another generation": (
        lambda scene: scene.store("row_entry", (scene.row, 2), scene.page(2) | 99 << 32),
        FindingKind.STALE,
    ),
    "a page that went on to another generation": (
        lambda scene: scene.store("page_word", scene.page(2), page_word(PageState.FILLING, 77)),
        FindingKind.STALE,
    ),
    "a free page in a row": (
        lambda scene: scene.store(
            "page_word", scene.page(2), page_word(PageState.FREE, generation(scene, scene.page(2)))
        ),
        FindingKind.STALE,
    ),
    "tokens that the hash is not of": (
        lambda scene: scene.store("page_tokens", (scene.page(0), 1), 12345),
        FindingKind.CONTENTS,
    ),
    "a hash that is not the tokens'": (
        lambda scene: scene.store("page_hash", (scene.core.pages.eviction_order()[0], 0), 5),
        FindingKind.CONTENTS,
    ),
    "a parent that is not the page before": (
        lambda scene: scene.store("page_parent", (scene.page(1), 0), 5),
        FindingKind.CONTENTS,
    ),
    "sealed tokens that the output does not have": (with_other_tokens, FindingKind.CONTENTS),
    "a token of the log that changed": (
        lambda scene: scene.output(scene.keys[0]).tokens.put(3, 77),
        FindingKind.CONTENTS,
    ),
    "more sealed than is known": (forget_tokens, FindingKind.CONTENTS),
    "a prompt that is not known": (lambda scene: scene.output(scene.keys[0]).set_progress(0, 5), FindingKind.LOG),
    "computed above known": (
        lambda scene: scene.output(scene.keys[0]).words.put(0, progress_word(10, 9)),
        FindingKind.LOG,
    ),
    "an end that is none": (lambda scene: scene.output(scene.keys[0]).words.put(1, 9 << 8), FindingKind.LOG),
    "computed beyond the row": (
        lambda scene: scene.output(scene.keys[0]).set_progress(13, 20),
        FindingKind.ROW,
    ),
    "a row that is longer than rows are": (
        lambda scene: scene.store("row_length", scene.row, 1 << 40),
        FindingKind.ROW,
    ),
    "a page that does not exist": (
        lambda scene: scene.store("row_entry", (scene.row, 2), (1 << 64) - 1),
        FindingKind.ROW,
    ),
    "two rows of one output": (set_twin, FindingKind.ROW),
    "an output that the record does not have": (
        lambda scene: scene.store("row_word", scene.row, row_word(RowState.LIVE, 3, scene.granted[0].generation)),
        FindingKind.ROW,
    ),
    "a row in no known state": (lambda scene: scene.store("row_word", scene.row, 9), FindingKind.ROW),
    "a pinned row among the others": (
        lambda scene: scene.store("row_word", 5, row_word(RowState.PINNED, 0, 1)),
        FindingKind.ROW,
    ),
    "sealed behind what is being filled": (sealed_behind, FindingKind.ROW),
    "a row whose record is gone": (lambda scene: scene.sources.pop(scene.keys[0]), FindingKind.LEAKED),
    "a page in no known state": (lambda scene: scene.store("page_word", scene.free_page, 7), FindingKind.LEAKED),
    "the reserved page in use": (lambda scene: scene.store("page_word", NO_PAGE, PageState.SEALED), FindingKind.LEAKED),
    "a pinned page that is not sealed": (
        lambda scene: scene.set_entry(1, scene.page(2), scene.pinned_row),
        FindingKind.PIN,
    ),
    "a pin of nothing": (lambda scene: scene.store("row_length", scene.pinned_row, 0), FindingKind.PIN),
    "a pin under another name": (
        lambda scene: scene.store("pin_name", scene.pinned_row - scene.tables.rows, 0),
        FindingKind.PIN,
    ),
    "a pinned page out of order": (
        lambda scene: scene.set_entry(1, scene.page(0), scene.pinned_row),
        FindingKind.CONTENTS,
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_damage_to_stored_words_is_found(name: str) -> None:
    damage, kind = STORED[name]
    scene = Scene()
    damage(scene)
    assert kind in scene.kinds()
    found = check_tables(scene.tables, scene.sources.get, orphans=True)
    assert kind in {finding.kind for finding in found}
    # Each says what a repair has to touch.
    assert all(finding.rows or finding.pages or finding.record for finding in found)
    assert not any(finding.is_derived for finding in found)


def test_a_row_without_a_record_is_the_next_attach_s_affair() -> None:
    scene = Scene()
    del scene.sources[scene.keys[0]]
    assert scene.core.check_integrity() == []


def lose_free_page(scene: Scene) -> None:
    scene.core.pages.free.pop()


DERIVED: dict[str, tuple[Damage, FindingKind]] = {
    "a page counted twice": (
        lambda scene: scene.core.pages.holders.put(scene.page(2), 2),
        FindingKind.DERIVED,
    ),
    "a page that nobody can get": (lose_free_page, FindingKind.LEAKED),
    "a free page that is held": (
        lambda scene: scene.core.pages.free.append(scene.page(2)),
        FindingKind.DERIVED,
    ),
    "a free page twice": (lambda scene: scene.core.pages.free.append(scene.free_page), FindingKind.DERIVED),
    "a wrong count of cached pages": (
        lambda scene: setattr(scene.core.pages, "cached", scene.core.pages.cached + 1),
        FindingKind.DERIVED,
    ),
    "a cached page that is never evicted": (lambda scene: scene.core.pages._eviction.clear(), FindingKind.DERIVED),
    "an order of eviction that is none": (lambda scene: scene.core.pages._eviction.reverse(), FindingKind.DERIVED),
    "a hash that is not found": (
        lambda scene: scene.core.pages.index._lowest.pop(scene.tables.page_hash[scene.page(0)].tobytes()),
        FindingKind.DERIVED,
    ),
    "a part that is not found": (
        lambda scene: scene.core.pages.index._children.popitem(),
        FindingKind.DERIVED,
    ),
    "a hash of no page": (
        lambda scene: scene.core.pages.index._lowest.__setitem__(b"x" * 16, scene.free_page),
        FindingKind.DERIVED,
    ),
    "a last use that is not the last": (lambda scene: setattr(scene.core.pages, "turn", 0), FindingKind.DERIVED),
    "a live row that is forgotten": (
        lambda scene: scene.core.rows.live.pop((scene.keys[0], 0)),
        FindingKind.DERIVED,
    ),
    "a row that is thought shorter": (
        lambda scene: setattr(scene.core.rows.live[scene.keys[0], 0], "length", 1),
        FindingKind.DERIVED,
    ),
    "a row that is thought less sealed": (
        lambda scene: setattr(scene.core.rows.live[scene.keys[0], 0], "sealed", 1),
        FindingKind.DERIVED,
    ),
    "a pin that is forgotten": (lambda scene: scene.core.rows.pinned.clear(), FindingKind.DERIVED),
    "pinned pages that are not counted": (
        lambda scene: setattr(scene.core.pins, "pages", frozenset()),
        FindingKind.DERIVED,
    ),
    "a free row that is lost": (lambda scene: scene.core.rows.free.pop(), FindingKind.DERIVED),
    "a generation that will come again": (lambda scene: setattr(scene.core.rows, "newest", 1), FindingKind.DERIVED),
}


@pytest.mark.parametrize("name", DERIVED)
def test_damage_to_derived_state_is_found_and_mended_by_deriving_it_anew(name: str) -> None:
    damage, kind = DERIVED[name]
    scene = Scene()
    damage(scene)
    found = scene.core.check_integrity()
    assert kind in {finding.kind for finding in found}
    assert all(finding.is_derived for finding in found)
    assert check_tables(scene.tables, scene.sources.get) == []
    scene.core.rebuild()
    assert scene.core.check_integrity() == []


def test_more_pages_than_a_step_takes() -> None:
    scene = Bench(pages=3 * STEP_PAGES, entries=64)
    for number in range(40):
        scene.fill(str(number), [number] * (PAGE_SIZE * 40))
    steps = list(check_steps(scene.core))
    assert len(steps) > 6 and not any(steps)
    last = max(scene.core.pages.eviction_order())
    assert last > STEP_PAGES
    scene.tables.page_tokens[last, 0] += 1
    assert [finding.pages for finding in check_tables(scene.tables, scene.sources.get)] == [(last,)]


@pytest.mark.parametrize("seed", range(20))
def test_no_bytes_make_the_check_itself_fail(seed: int) -> None:
    scene = Scene()
    rng = np.random.default_rng(seed)
    raw = np.frombuffer(scene.tables._buffer, np.uint64)
    places = rng.integers(0, len(raw), 200)
    raw[places] = rng.integers(0, 1 << 64, 200, np.uint64)
    assert check_tables(scene.tables, scene.sources.get, orphans=True)
