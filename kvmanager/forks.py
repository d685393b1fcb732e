"""What a fork starts from: a sibling's row, and the part of its tail page that is to be copied."""

from __future__ import annotations

from dataclasses import dataclass

from kvmanager.errors import Refusal, Refused
from kvmanager.layout import Tables, generation_of, usable_computed
from kvmanager.matching import PageCopy
from kvmanager.rows import Row, Rows
from kvmanager.source import Source


@dataclass(frozen=True, slots=True)
class Fork:
    """Output `index` of a request begins with the first `length` tokens of output `from_index`."""

    key: str
    index: int
    from_index: int
    from_generation: int
    length: int


def find_parent(tables: Tables, rows: Rows, source: Source, fork: Fork) -> Row | None:
    """The sibling's row; None when it is gone, or has given up what it had computed. Raises Refused(INVALID)."""
    length, ours, theirs = fork.length, source.outputs[fork.index], source.outputs[fork.from_index]
    is_own = fork.index == fork.from_index
    if is_own or length > ours.known or (ours.tokens[:length] != theirs.tokens[:length]).any():
        message = f"output {fork.index} of {fork.key} cannot begin with {length} tokens of output {fork.from_index}"
        raise Refused(Refusal.INVALID, message)
    row = rows.live.get((fork.key, fork.from_index))
    if row is None or row.generation != fork.from_generation:
        return None
    return row if length <= min(usable_computed(tables, row.number, theirs.computed), theirs.known) else None


def tail_of(tables: Tables, rows: Rows, parent: Row, length: int) -> PageCopy | None:
    """What lies behind the last page border below `length` tokens."""
    whole, tokens = divmod(length, int(tables.page_tokens.shape[1]))
    if not tokens:
        return None
    page = int(rows.pages(parent)[whole])
    return PageCopy(page, generation_of(tables.page_word[page]), tokens)
