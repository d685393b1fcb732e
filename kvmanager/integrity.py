"""What must hold whenever no call is under way: of the tables, and of what is derived from them.

The check is a series of short steps. It is right only if nothing changes between two of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from kvmanager.findings import Finding, FindingKind
from kvmanager.layout import PageState, RowState
from kvmanager.pages import TURN_SHIFT
from kvmanager.stored import STEP_PAGES, Stored

if TYPE_CHECKING:
    from kvmanager.core import ManagerCore

__all__ = ["Finding", "FindingKind", "check_integrity", "check_steps"]

_SEALED: Final = int(PageState.SEALED)
_FREE_ROW: Final = int(RowState.FREE)
_HASH: Final = 16  # bytes


def check_integrity(core: ManagerCore) -> list[Finding]:
    """All that is wrong; empty when all is well. Changes nothing."""
    return [finding for step in check_steps(core) for finding in step]


def check_steps(core: ManagerCore, orphans: bool = False) -> Iterator[list[Finding]]:
    """What each step finds. orphans: also rows whose record is gone, which the next attach gives back."""
    stored = Stored(core.tables, core.sources, orphans)
    yield from stored.rows()
    yield from stored.pages()
    yield _check_rows(core, stored)
    yield from _check_pages(core, stored)


def _differs(what: str, found: object, wanted: object) -> Finding:
    message = f"derived state differs from the tables: {what} {found}, should be {wanted}"
    return Finding(FindingKind.DERIVED, message, is_derived=True)


def _check_rows(core: ManagerCore, stored: Stored) -> list[Finding]:
    tables, rows, wrong = core.tables, core.rows, list[Finding]()
    if rows.live != stored.live:
        keys = sorted(rows.live.keys() | stored.live.keys())
        key = next(key for key in keys if rows.live.get(key) != stored.live.get(key))
        wrong.append(_differs(f"the row of output {key[1]} of {key[0]} is", rows.live.get(key), stored.live.get(key)))
    pinned, wanted = (
        {key: (row.number, row.index, row.generation, row.length) for key, row in found.items()}
        for found in (rows.pinned, stored.pinned)
    )
    if pinned != wanted:
        wrong.append(_differs("pinned rows are", pinned, wanted))
    if core.pins.pages != stored.pinned_pages:
        wrong.append(_differs("pinned pages are", sorted(core.pins.pages), sorted(stored.pinned_pages)))
    words = tables.row_word.tolist()
    free = [number for number in range(tables.rows) if words[number] & 0xFF == _FREE_ROW]
    if sorted(rows.free) != free:
        wrong.append(_differs("free rows are", sorted(rows.free), free))
    newest = max(words, default=0) >> 32
    if rows.newest != newest:
        wrong.append(_differs("the newest row generation is", rows.newest, newest))
    return wrong


def _check_pages(core: ManagerCore, stored: Stored) -> Iterator[list[Finding]]:
    """Each page is held, free, cached or none of these, and is known as just that."""
    pages = core.pages
    free, evictable = set[int](), set[tuple[int, int]]()
    for start in range(0, max(len(pages.free), len(pages.eviction_heap)), STEP_PAGES):
        free.update(pages.free[start : start + STEP_PAGES])
        evictable.update(pages.eviction_heap[start : start + STEP_PAGES])
        yield _check_heap(pages.eviction_heap, start)
    totals = _Totals()
    for start in range(1, pages.count, STEP_PAGES):
        yield _check_some(core, stored, free, evictable, start, totals)
    yield _check_totals(core, totals, len(free))


def _check_heap(heap: Sequence[tuple[int, int]], start: int) -> list[Finding]:
    for place in range(max(start, 1), min(start + STEP_PAGES, len(heap))):
        if heap[(place - 1) >> 1] > heap[place]:
            return [_differs("in the eviction order", heap[(place - 1) >> 1], f"behind {heap[place]}")]
    return []


class _Totals:
    """Counted page by page."""

    __slots__ = ("cached", "free", "newest_use", "sealed")

    def __init__(self) -> None:
        self.free = self.cached = self.sealed = self.newest_use = 0


def _check_some(
    core: ManagerCore, stored: Stored, free: set[int], evictable: set[tuple[int, int]], start: int, totals: _Totals
) -> list[Finding]:
    tables, pages, wrong = core.tables, core.pages, list[Finding]()
    end = min(start + STEP_PAGES, pages.count)
    words, used = tables.page_word[start:end].tolist(), tables.page_used[start:end].tolist()
    hashes, parents = tables.page_hash[start:end].tobytes(), tables.page_parent[start:end].tobytes()
    firsts, holders = tables.page_tokens[start:end, 0].tolist(), pages.holders[start:end].tolist()
    index, limit = pages.index, pages.limit
    totals.newest_use = max(totals.newest_use, *used)
    for offset, word in enumerate(words):
        page, held = start + offset, stored.holders.get(start + offset, 0)
        if holders[offset] != held:
            wrong.append(_differs(f"page {page} is counted in", holders[offset], f"{held} rows"))
        if word & 0xFF == _SEALED:
            totals.sealed += 1
            place = slice(offset * _HASH, (offset + 1) * _HASH)
            siblings = index.children(parents[place], firsts[offset])
            found = bisect_left(siblings, page)
            if siblings[found : found + 1] != [page] or page not in index.pages_of(hashes[place]):
                wrong.append(_differs(f"the prefix index finds page {page}", False, True))
            if not held:
                totals.cached += 1
                if (used[offset], page) not in evictable:
                    wrong.append(_differs(f"the eviction order names cached page {page}", False, True))
        elif not held and page < limit:
            totals.free += 1
            if page not in free:
                message = f"page {page} is neither held nor free nor cached"
                wrong.append(Finding(FindingKind.LEAKED, message, is_derived=True))
    return wrong


def _check_totals(core: ManagerCore, totals: _Totals, free: int) -> list[Finding]:
    """With each page found where it belongs, equal counts leave nothing that does not belong there."""
    pages = core.pages
    counts = {
        "free pages are": ((len(pages.free), free), (totals.free, totals.free)),
        "cached pages are": (pages.cached, totals.cached),
        "pages in the prefix index are": (pages.index.counts(), (totals.sealed, totals.sealed)),
        "the turn is": (pages.turn, max(totals.newest_use, int(core.tables.page_used[0])) >> TURN_SHIFT),
    }
    return [_differs(what, found, wanted) for what, (found, wanted) in counts.items() if found != wanted]
