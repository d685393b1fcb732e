"""What must hold of the tables alone, and of the logs that their rows belong to.

Nothing is relied on: every number is checked before it is used, so that any bytes can be looked at. The
work comes in steps of a few milliseconds at most, between which a daemon can answer calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from kvmanager.findings import Finding, FindingKind
from kvmanager.keys import pin_key, words_pin
from kvmanager.layout import LOW32, NO_PAGE, OutputLog, PageState, RowState, Tables
from kvmanager.prefix import Hash, page_hash
from kvmanager.rows import Row
from kvmanager.source import Source

STEP_PAGES: Final = 512  # looked at in one step

# An enum's member costs as much as all else that is done with a word.
_FREE: Final = int(PageState.FREE)
_FILLING: Final = int(PageState.FILLING)
_SEALED: Final = int(PageState.SEALED)
_LIVE: Final = int(RowState.LIVE)
_PINNED: Final = int(RowState.PINNED)
_HASH: Final = 16  # bytes


def check_tables(tables: Tables, sources: Callable[[str], Source | None], orphans: bool = False) -> list[Finding]:
    """All that is wrong with the stored words; empty when all is well. Arguments as for `Stored`."""
    stored = Stored(tables, sources, orphans)
    return [finding for steps in (stored.rows(), stored.pages()) for step in steps for finding in step]


class Stored:
    """One pass over the tables: first `rows`, then `pages`, each a series of steps that say what they found.

    What it gathers on the way is what derived state must be.
    """

    def __init__(self, tables: Tables, sources: Callable[[str], Source | None], orphans: bool) -> None:
        """orphans: whether a row whose record is gone is a finding. The next executor's attach gives it back."""
        self.live: dict[tuple[str, int], Row] = {}
        self.pinned: dict[str, Row] = {}
        self.holders: dict[int, int] = {}  # rows that name the page, by page
        self.pinned_pages: set[int] = set()
        self._tables = tables
        self._sources = sources
        self._orphans = orphans
        self._count, self._size = tables.page_tokens.shape
        self._capacity = tables.row_entry.shape[1]
        self._words = tables.page_word.data
        self._hashes = tables.page_hash.data.cast("B")
        self._parents = tables.page_parent.data.cast("B")
        self._tokens = tables.page_tokens.data.cast("B")

    # --- rows ---

    def rows(self) -> Iterator[list[Finding]]:
        for number, word in enumerate(self._tables.row_word.tolist()):
            if word & 0xFF:
                yield self._row(number, word)

    def _row(self, number: int, word: int) -> list[Finding]:
        tables, state = self._tables, word & 0xFF
        length = int(tables.row_length[number])
        if state not in (_LIVE, _PINNED):
            return [_of_row(FindingKind.ROW, number, "is in no known state")]
        if (state == _PINNED) != (number >= tables.rows):
            return [_of_row(FindingKind.ROW, number, "is in a place for the other kind of row")]
        if length > self._capacity:
            return [_of_row(FindingKind.ROW, number, "is longer than a row can be")]
        key = tables.row_key[number].tobytes().hex()
        row = Row(number, key, word >> 8 & 0xFFFFFF, word >> 32, length)
        entries = tables.row_entry[number, :length].tolist()
        pages = [entry & LOW32 for entry in entries]
        if pages and max(pages) >= self._count:
            return [_of_row(FindingKind.ROW, number, f"names page {max(pages)}, which does not exist")]
        wrong = self._entries(row, entries, pages)
        return wrong + (self._pinned_row(row, pages) if state == _PINNED else self._live_row(row, pages))

    def _entries(self, row: Row, entries: list[int], pages: list[int]) -> list[Finding]:
        """Also counts the row's pages, and its leading sealed ones."""
        wrong: list[Finding] = []
        words, holders = self._words, self.holders
        leading, filling = True, False
        for place, (entry, page) in enumerate(zip(entries, pages, strict=True)):
            if page == NO_PAGE:
                leading = False
                continue
            word = words[page]
            state = word & 0xFF
            holders[page] = holders.get(page, 0) + 1
            if entry >> 32 != word >> 32:
                message = f"entry {place} names page {page} of another generation"
                wrong.append(_of_row(FindingKind.STALE, row.number, message))
            elif state == _FREE:
                wrong.append(_of_row(FindingKind.STALE, row.number, f"entry {place} names the free page {page}"))
            if state != _SEALED:
                leading, filling = False, True
            elif filling:
                wrong.append(_of_row(FindingKind.ROW, row.number, f"entry {place} is sealed behind one that is not"))
            elif leading:
                row.sealed += 1
        return wrong

    def _live_row(self, row: Row, pages: list[int]) -> list[Finding]:
        twin = self.live.get((row.key, row.index))
        if twin is not None:
            message = f"rows {twin.number} and {row.number} belong to the same output {row.index} of {row.key}"
            return [Finding(FindingKind.ROW, message, rows=(twin.number, row.number))]
        self.live[row.key, row.index] = row
        try:
            source = self._sources(row.key)
        except (OSError, ValueError) as error:
            return [Finding(FindingKind.LOG, f"the log of {row.key} cannot be read: {error}", record=row.key)]
        if source is None:
            message = f"belongs to {row.key}, which has no record"
            return [_of_row(FindingKind.LEAKED, row.number, message)] if self._orphans else []
        if row.index >= len(source.outputs):
            message = f"belongs to output {row.index}, which {row.key} does not have"
            return [_of_row(FindingKind.ROW, row.number, message)]
        output = source.outputs[row.index]
        return self._reach(row, output) + self._chain(row, pages, output, source.root)

    def _reach(self, row: Row, output: OutputLog) -> list[Finding]:
        """The row against the numbers in its log. An executor may be raising them meanwhile."""
        if not output.is_sound:
            message = f"the log of output {row.index} of {row.key} contradicts itself"
            return [Finding(FindingKind.LOG, message, record=row.key)]
        computed = output.computed
        if computed > row.length * self._size:
            message = f"has no page for position {computed - 1}, which counts as computed"
            return [_of_row(FindingKind.ROW, row.number, message)]
        return []

    def _chain(self, row: Row, pages: list[int], output: OutputLog, root: Hash) -> list[Finding]:
        """A row's sealed pages are its own output's tokens, chained from its root."""
        sealed, known, parent, nbytes = row.sealed, output.known, root, self._size * 4
        wrong: list[Finding] = []
        if sealed * self._size > known:
            message = f"has {sealed} sealed pages, more than its {known} known tokens fill"
            return [_of_row(FindingKind.CONTENTS, row.number, message)]
        tokens = output.tokens[: sealed * self._size].tobytes()
        for place, page in enumerate(pages[:sealed]):
            if self._tokens[page * nbytes : (page + 1) * nbytes] != tokens[place * nbytes : (place + 1) * nbytes]:
                message = f"entry {place} is sealed with tokens that its output does not have"
                wrong.append(_of_row(FindingKind.CONTENTS, row.number, message))
            wrong += self._follows(row, place, page, parent)
            parent = bytes(self._hashes[page * _HASH : (page + 1) * _HASH])
        return wrong

    def _follows(self, row: Row, place: int, page: int, parent: Hash) -> list[Finding]:
        if self._parents[page * _HASH : (page + 1) * _HASH] == parent:
            return []
        return [_of_row(FindingKind.CONTENTS, row.number, f"entry {place} does not follow the page before it")]

    def _pinned_row(self, row: Row, pages: list[int]) -> list[Finding]:
        place, wrong = row.number - self._tables.rows, list[Finding]()
        words = self._tables.pin_name[place]
        is_cut = bool(words[-1])  # a longer name is not stored whole
        if row.key in self.pinned:
            wrong.append(_of_row(FindingKind.PIN, row.number, "pins a prefix under a name that is taken"))
        if row.index != place or (not is_cut and row.key != pin_key(*words_pin(words))):
            wrong.append(_of_row(FindingKind.PIN, row.number, "pins a prefix without its name"))
        if not pages or row.sealed < row.length:
            wrong.append(_of_row(FindingKind.PIN, row.number, "pins a page that is not sealed, or none"))
        for number in range(1, row.sealed):
            before = pages[number - 1]
            parent = bytes(self._hashes[before * _HASH : (before + 1) * _HASH])
            wrong += self._follows(row, number, pages[number], parent)
        self.pinned.setdefault(row.key, row)
        self.pinned_pages.update(pages)
        return wrong

    # --- pages ---

    def pages(self) -> Iterator[list[Finding]]:
        if self._count and self._words[NO_PAGE] & 0xFF != _FREE:
            yield [Finding(FindingKind.LEAKED, f"page {NO_PAGE} is in use, which is reserved", pages=(NO_PAGE,))]
        for start in range(1, self._count, STEP_PAGES):
            yield self._some_pages(start, min(start + STEP_PAGES, self._count))

    def _some_pages(self, start: int, end: int) -> list[Finding]:
        tables, wrong = self._tables, list[Finding]()
        hashes, parents = tables.page_hash[start:end].tobytes(), tables.page_parent[start:end].tobytes()
        tokens, holders = tables.page_tokens, self.holders
        for page, word in enumerate(tables.page_word[start:end].tolist(), start):
            state = word & 0xFF
            if state == _SEALED:
                place = slice((page - start) * _HASH, (page - start + 1) * _HASH)
                if page_hash(parents[place], tokens[page]) != hashes[place]:
                    message = f"sealed page {page} does not have the hash of its tokens"
                    wrong.append(Finding(FindingKind.CONTENTS, message, pages=(page,)))
            elif state > _SEALED:
                wrong.append(Finding(FindingKind.LEAKED, f"page {page} is in no known state", pages=(page,)))
            elif holders.get(page, 0) > 1:
                message = f"page {page} is in {holders[page]} rows and not sealed"
                wrong.append(Finding(FindingKind.DOUBLE_OWNED, message, rows=self._rows_with(page)))
        return wrong

    def _rows_with(self, page: int) -> tuple[int, ...]:
        rows = sorted([*self.live.values(), *self.pinned.values()], key=lambda row: row.number)
        entries = self._tables.row_entry
        return tuple(row.number for row in rows if page in (entries[row.number, : row.length] & LOW32).tolist())


def _of_row(kind: FindingKind, number: int, what: str) -> Finding:
    return Finding(kind, f"row {number} {what}", rows=(number,))
