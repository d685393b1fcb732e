"""Sealing: pages that lie wholly below `computed` become immutable, hashed, and shareable.

Which rows are worth a look is a hint, not state: those that are new or have grown, until every whole
page of known tokens is sealed. A row that fills its last page without growing is sealed when it closes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Final

import numpy as np

from kvmanager.layout import U32, PageState, Tables
from kvmanager.pages import Pages
from kvmanager.prefix import Hash, from_words, page_hash
from kvmanager.rows import Row, Rows
from kvmanager.source import Source

_STATE = np.uint64(0xFF)
_MOST_ALIKE: Final = 16  # rows that are looked at before a match; the oldest of them are the furthest


class Sealer:
    """Seals pages of rows, from the progress in their logs."""

    def __init__(
        self,
        tables: Tables,
        rows: Rows,
        pages: Pages,
        sources: Callable[[str], Source | None],
        on_look: Callable[[Row, Source], None],
    ) -> None:
        """on_look: told of a row whenever it has been looked at."""
        self._tables = tables
        self._rows = rows
        self._pages = pages
        self._sources = sources
        self._on_look = on_look
        self._size = int(tables.page_tokens.shape[1])
        self._hinted: dict[int, Row] = {}  # by row number
        # The new ones among them, by what they begin with: nobody else's pages can begin a match.
        self._new: dict[bytes, dict[int, Row]] = {}
        self._opening: dict[int, bytes] = {}

    def rebuild(self) -> None:
        """How far each row is sealed, from the tables."""
        rows = self._rows.live.values()
        for row in rows:
            sealed = self._tables.page_word[self._rows.pages(row)] & _STATE == PageState.SEALED
            row.sealed = row.length if sealed.all() else int(np.argmin(sealed))
        self._hinted, self._new, self._opening = {}, {}, {}
        for row in rows:
            source = self._sources(row.key)
            if source is not None and row.index < len(source.outputs):
                self.made(row, source)

    def made(self, row: Row, source: Source) -> None:
        """The row is new."""
        self._forget(row.number)  # a row that had the place before
        opening = self._opens_with(source.root, source.outputs[row.index].tokens)
        self._hinted[row.number] = row
        self._new.setdefault(opening, {})[row.number] = row
        self._opening[row.number] = opening

    def _opens_with(self, root: Hash, tokens: U32) -> bytes:
        return root + tokens[: self._size].tobytes()

    def grew(self, row: Row) -> None:
        """The row has filled pages, or is about to."""
        self._hinted[row.number] = row

    def seal_all(self) -> int:
        """Looks at every row that may have something to seal; how many pages were sealed."""
        return sum([self._look(row) for row in list(self._hinted.values())])

    def seal_alike(self, root: Hash, tokens: U32) -> None:
        """Looks at rows whose pages these tokens could match."""
        for row in list(islice(self._new.get(self._opens_with(root, tokens), {}).values(), _MOST_ALIKE)):
            self._look(row)

    def _look(self, row: Row) -> int:
        source = self._sources(row.key)
        if source is None or self._rows.live.get((row.key, row.index)) is not row:
            self._drop(row)
            return 0
        count = self.seal(row, source)
        self._on_look(row, source)
        if source.outputs[row.index].known // self._size <= row.sealed:
            self._drop(row)
        return count

    def _drop(self, row: Row) -> None:
        if self._hinted.get(row.number) is row:  # or the place has another row by now
            self._forget(row.number)

    def _forget(self, number: int) -> None:
        self._hinted.pop(number, None)
        opening = self._opening.pop(number, None)
        if opening is not None:
            del self._new[opening][number]
            if not self._new[opening]:
                del self._new[opening]

    def seal(self, row: Row, source: Source) -> int:
        """Seals the row's pages that lie wholly below `computed`; how many."""
        output, size = source.outputs[row.index], self._size
        full = min(output.computed // size, row.length)
        done = row.sealed
        if done >= full:
            return 0
        pages = self._rows.pages(row)[:full].tolist()
        parent = from_words(self._tables.page_hash[pages[done - 1]]) if done else source.root
        for number in range(done, full):
            tokens = output.tokens[number * size : (number + 1) * size]
            content = page_hash(parent, tokens)
            self._pages.seal(pages[number], content, parent, tokens)
            row.sealed = number + 1
            parent = content
        return full - done
