"""Pages for rows: what a new row needs and wants, and how many rows grow together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvmanager.errors import Refusal, Refused
from kvmanager.layout import U64, RowState, Tables
from kvmanager.pages import Ids, Pages
from kvmanager.pins import Pins
from kvmanager.rows import Row, Rows


@dataclass(frozen=True, slots=True)
class Wants:
    """Of one new row."""

    capacity: int  # tokens that it must hold
    headroom: int  # tokens beyond them, if pages are plenty
    keep_free: int  # pages that are to stay available

    def within(self, most: int) -> Wants:
        """Not beyond the last position that the output can write."""
        capacity = min(self.capacity, most)
        return Wants(capacity, min(self.capacity + self.headroom, most) - capacity, self.keep_free)


class Allocator:
    """Takes pages for rows. A refused call changes nothing."""

    def __init__(self, tables: Tables, rows: Rows, pages: Pages, pins: Pins) -> None:
        self._tables = tables
        self._rows = rows
        self._pages = pages
        self._pins = pins
        self._size = int(tables.page_tokens.shape[1])

    def make(self, key: str, index: int, shared: Ids, wants: Wants) -> Row:
        """A row over `shared` sealed pages, i64 [n], and fresh ones. Raises Refused."""
        pages, most = self._pages, self._longest(shared)
        need = self._pages_for(wants.capacity)
        if need > most:
            raise Refused(Refusal.TOO_LARGE, f"{wants.capacity} tokens are more than the {most} pages of a row")
        if not self._rows.free:
            raise Refused(Refusal.NO_ROWS, "all rows are in use")
        fresh = max(need - len(shared), 0)
        wish = min(self._pages_for(wants.capacity + wants.headroom), most) - len(shared) - fresh
        # Held before any page is taken, or taking could evict one of them.
        pages.hold(shared)
        try:
            extra = self._reserve(fresh, wish, wants.keep_free)
        except Refused:
            pages.release(shared)
            raise
        named = np.concatenate([shared, pages.take(fresh + extra)])
        return self._rows.make(key, index, named, pages.generations(named), len(shared))

    def _longest(self, shared: Ids) -> int:
        """How many pages a row over these can ever have: what is pinned is there for its sharers only."""
        pinned = self._pins.pages
        mine = len(pinned.intersection(shared.tolist())) if pinned else 0
        return min(self._rows.capacity, self._pages.promised - len(pinned) + mine)

    def _reserve(self, fresh: int, wish: int, keep_free: int) -> int:
        """Makes sure of `fresh` pages. Returns how many of the `wish` beyond them may be taken too."""
        pages = self._pages
        left = pages.available - fresh
        if fresh and (left < keep_free or not pages.reserve(fresh)):
            raise Refused(Refusal.NO_PAGES, f"{fresh} pages wanted, {pages.available} left")
        extra = max(min(wish, pages.available - fresh - max(self._watermark, keep_free)), 0)
        return extra if extra and pages.reserve(fresh + extra) else 0

    def grow(self, rows: Ids, generations: U64, capacities: Ids, headrooms: Ids) -> tuple[list[Row], Ids]:
        """The rows that grew, and tokens that each of `rows` holds now. Raises Refused; see EnsureRowsRequest.

        rows, capacities, headrooms: i64 [n]; generations: u64 [n]; returns i64 [n], 0: the row is gone.
        """
        tables, pages, size = self._tables, self._pages, self._size
        if len(set(rows.tolist())) < len(rows) or (rows >= tables.rows).any():
            raise Refused(Refusal.INVALID, "rows to be ensured are named twice, or do not exist")
        words = tables.row_word[rows]
        live = (words >> np.uint64(32) == generations) & (words & np.uint64(0xFF) == RowState.LIVE)
        lengths = tables.row_length[rows].astype(np.int64)
        needed = np.minimum(-(-capacities // size), self._rows.capacity)
        wished = np.minimum(-(-(capacities + headrooms) // size), self._rows.capacity)
        needs = np.where(live, np.maximum(needed - lengths, 0), 0)
        wishes = np.where(live, np.maximum(wished - np.maximum(needed, lengths), 0), 0)
        granted = share_out(needs, wishes, pages.available, self._watermark)
        while not pages.reserve(int(granted.sum())):  # the pool has become smaller
            granted = share_out(needs, wishes, pages.available, self._watermark)
        grown: list[Row] = []
        grows = granted > 0
        if grows.any():
            taken = pages.take(int(granted.sum()))
            grown = self._rows.extend(rows[grows], granted[grows], taken, pages.generations(taken))
        return grown, np.where(live, (lengths + granted) * size, 0)

    @property
    def _watermark(self) -> int:
        """Pages that nobody gets as headroom."""
        return max(1, self._pages.usable // 100)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._size)


def share_out(needs: Ids, wishes: Ids, available: int, watermark: int) -> Ids:
    """Pages for each row, i64 [rows], the first rows served first.

    needs: i64 [rows], what each must have, or gets nothing. wishes: i64 [rows], what it would like on
    top: given only while `watermark` pages stay available, and all of it or none.
    """
    if needs.sum() + wishes.sum() <= available - watermark:
        return needs + wishes
    fits = np.cumsum(needs) <= available
    granted = np.where(fits, needs, 0)
    wishes = np.where(fits, wishes, 0)
    room = available - watermark - int(granted.sum())
    return np.asarray(granted + np.where(np.cumsum(wishes) <= room, wishes, 0))
