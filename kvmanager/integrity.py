"""What must hold of the tables and of what is derived from them, whenever no call is under way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmanager.layout import NO_PAGE, PageState, RowState, entry, state_of
from kvmanager.prefix import Hash, from_words, page_hash
from kvmanager.rows import Row

if TYPE_CHECKING:
    from kvmanager.core import ManagerCore, Source


@dataclass(frozen=True, slots=True)
class Derived:
    """All derived state, in a form that two cores can be compared by."""

    holders: tuple[int, ...]
    free: tuple[int, ...]
    cached: int
    eviction_order: tuple[int, ...]
    index: dict[Hash, tuple[int, ...]]
    turn: int
    live: dict[tuple[str, int], Row]
    free_rows: tuple[int, ...]
    newest_row: int


def derived(core: ManagerCore) -> Derived:
    pages, rows = core.pages, core.rows
    return Derived(
        holders=tuple(pages.holders.tolist()),
        free=tuple(sorted(pages.free)),
        cached=pages.cached,
        eviction_order=tuple(pages.eviction_order()),
        index=pages.index.snapshot(),
        turn=pages.turn,
        live=rows.live,
        free_rows=tuple(sorted(rows.free)),
        newest_row=rows.newest,
    )


def check_integrity(core: ManagerCore) -> list[str]:
    """What is wrong, in words; empty when all is well. Changes nothing."""
    fresh = type(core)(core.tables, core.sources, limit=core.pages.limit)
    now, then = derived(core), derived(fresh)
    wrong = [
        f"derived state differs from the tables: {name} is {getattr(now, name)}, should be {getattr(then, name)}"
        for name in Derived.__slots__
        if getattr(now, name) != getattr(then, name)
    ]
    return wrong + check_tables(core)


def check_tables(core: ManagerCore) -> list[str]:
    """The stored words alone: rows, pages, hashes and logs against each other."""
    tables = core.tables
    wrong = []
    live = np.count_nonzero(tables.row_word & np.uint64(0xFF) == RowState.LIVE)
    if live != len(core.rows.live):
        wrong.append("two live rows belong to the same output")
    holders: Counter[int] = Counter()
    for row in core.rows.live.values():
        if row.length > core.rows.capacity:
            wrong.append(f"row {row.number} is longer than a row can be")
            continue
        wrong += _check_entries(core, row)
        source = core.sources(row.key)
        if source is not None:
            wrong += _check_contents(core, row, source)
        holders.update(core.rows.pages(row).tolist())
    for page, count in holders.items():
        if count > 1 and page != NO_PAGE and state_of(tables.page_word[page]) != PageState.SEALED:
            wrong.append(f"page {page} is in {count} rows and not sealed")
    for page in np.flatnonzero(tables.page_word & np.uint64(0xFF) == PageState.SEALED).tolist():
        content = page_hash(from_words(tables.page_parent[page]), tables.page_tokens[page])
        if content != from_words(tables.page_hash[page]):
            wrong.append(f"sealed page {page} does not have the hash of its tokens")
    return wrong


def _check_entries(core: ManagerCore, row: Row) -> list[str]:
    wrong = []
    pages = core.rows.pages(row)
    generations = core.pages.generations(pages).tolist()
    words = core.tables.row_entry[row.number, : row.length].tolist()
    for number, (word, page, generation) in enumerate(zip(words, pages.tolist(), generations, strict=True)):
        if page != NO_PAGE and word != entry(page, generation):
            wrong.append(f"row {row.number} entry {number} names page {page} of another generation")
        state = state_of(core.tables.page_word[page])
        if page != NO_PAGE and state == PageState.FREE:
            wrong.append(f"row {row.number} entry {number} names the free page {page}")
        if number >= row.sealed and state == PageState.SEALED:
            wrong.append(f"row {row.number} entry {number} is sealed behind one that is not")
    return wrong


def _check_contents(core: ManagerCore, row: Row, source: Source) -> list[str]:
    """A row's sealed pages are its own output's tokens, chained from its root."""
    if row.index >= len(source.outputs):
        return [f"row {row.number} belongs to output {row.index}, which {row.key} does not have"]
    wrong = []
    output, size, parent = source.outputs[row.index], core.page_size, source.root
    if not output.computed <= output.known <= output.capacity:
        wrong.append(f"row {row.number}: computed {output.computed}, known {output.known} of {output.capacity}")
    for number, page in enumerate(core.rows.pages(row)[: row.sealed].tolist()):
        tokens = output.tokens[number * size : (number + 1) * size]
        if (number + 1) * size > output.known or (core.tables.page_tokens[page] != tokens).any():
            wrong.append(f"row {row.number} entry {number} is sealed with tokens that its output does not have")
        if from_words(core.tables.page_parent[page]) != parent:
            wrong.append(f"row {row.number} entry {number} does not follow the page before it")
        parent = from_words(core.tables.page_hash[page])
    return wrong
