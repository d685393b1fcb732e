"""Whether a request, and the prefix that it pins, can ever have pages beside the prefixes that are pinned.

Checked when a request is opened, against what is pinned and what open requests are going to pin, so
that neither a pin nor a request is accepted that the other makes impossible.
"""

from __future__ import annotations

from kvmanager.core import ManagerCore
from kvmanager.errors import Refusal, Refused
from kvmanager.layout import MOST_PINS, U32
from kvmanager.matching import match_pages
from kvmanager.pins import Pin
from kvmanager.source import Source

REMEDY = "see `pagehold prefix list` and `pagehold prefix unpin`"


def check_room(core: ManagerCore, unfinished: list[Source], new: Source, prompt: U32, tokens: int) -> None:
    """Raises Refused(TOO_LARGE or QUOTA).

    new: has no outputs yet. prompt: u32 [n]. tokens: positions that an output can come to need.
    """
    size, usable = core.page_size, core.pages.usable
    coming: dict[str, int] = {}
    for source in unfinished:
        if source.pin is not None:
            output = source.outputs[0]
            _add(core, coming, source.pin, output.tokens[: output.prompt_length])
    pinned = len(core.pins.pages) + sum(coming.values())
    if new.pin is not None:
        _add(core, coming, new.pin, prompt)
        _check_pin(core, unfinished, coming)
    need = -(-tokens // size)
    if need > usable - pinned:
        shared = core.pins.pages.intersection(match_pages(core.tables, core.pages.index, new.root, prompt).tolist())
        if need > usable - pinned + len(shared):
            message = f"{tokens} tokens do not fit beside pinned prefixes of {pinned * size} tokens; {REMEDY}"
            raise Refused(Refusal.TOO_LARGE, message)


def _add(core: ManagerCore, coming: dict[str, int], pin: Pin, prompt: U32) -> None:
    """Counts what this pin may come to hold beyond what is pinned now: of several under one name, the largest."""
    size = core.page_size
    whole = len(prompt) // size
    row = core.rows.pinned.get(pin.key)
    if row is not None and row.length == whole:
        last = core.tables.page_tokens[core.rows.pages(row)[-1]]
        if (last == prompt[(whole - 1) * size : whole * size]).all():
            return  # it is pinned already
    coming[pin.key] = max(coming.get(pin.key, 0), whole)


def _check_pin(core: ManagerCore, unfinished: list[Source], coming: dict[str, int]) -> None:
    if len(core.rows.pinned.keys() | coming.keys()) > MOST_PINS:
        raise Refused(Refusal.QUOTA, f"{MOST_PINS} prefixes are pinned, which is the most; {REMEDY}")
    pinned = len(core.pins.pages) + sum(coming.values())
    largest = max((_need(source, core.page_size) for source in unfinished), default=0)
    if pinned > min(core.pins.most_pages, core.pages.usable - largest):
        raise Refused(Refusal.QUOTA, f"{pinned} pages would be pinned, more than the pool can spare; {REMEDY}")


def _need(source: Source, size: int) -> int:
    """Pages that an output can come to need beside what its request pins itself."""
    output = source.outputs[0]
    own = output.prompt_length // size if source.pin is not None else 0
    return -(-(output.capacity - 1) // size) - own
