"""What a check has found: one thing that is wrong, and what a repair must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class FindingKind(Enum):
    """Sent by name in `FsckResponse`."""

    DERIVED = auto()  # counts, free list, prefix index or eviction order differ from what the tables make them
    DOUBLE_OWNED = auto()  # a page that is not sealed, in two rows
    LEAKED = auto()  # a page that nobody can get any more; a row whose record is gone
    STALE = auto()  # an entry of another page generation, or of a free page
    CONTENTS = auto()  # sealed pages that are not the tokens that they stand for
    ROW = auto()  # a row that contradicts itself, its log or another row
    LOG = auto()  # a record or a log that contradicts itself or lacks the other
    PIN = auto()  # a pinned row that is none
    FILE = auto()  # a file that a death left half-made


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. A repair frees `rows`, invalidates `pages`, removes `files`, sets `record` aside."""

    kind: FindingKind
    message: str
    rows: tuple[int, ...] = ()  # numbers
    pages: tuple[int, ...] = ()  # ids
    files: tuple[str, ...] = ()  # names below the state folder
    record: str = ""  # a key
    is_derived: bool = False  # the tables are right: deriving everything anew mends it

    def __str__(self) -> str:
        return self.message
