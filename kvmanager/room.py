"""Whether a request, and the prefix that it pins, can ever have pages beside the prefixes that are pinned.

Checked when a request is opened, against what is pinned and what open requests are going to pin, so
that neither a pin nor a request is accepted that the other makes impossible.
"""

from __future__ import annotations

from kvmanager.core import ManagerCore
from kvmanager.errors import Refusal, Refused
from kvmanager.layout import MOST_PINS, U32
from kvmanager.matching import match_pages
from kvmanager.source import Source

REMEDY = "see `pagehold prefix list` and `pagehold prefix unpin`"


def check_room(core: ManagerCore, unfinished: list[Source], new: Source, prompt: U32, tokens: int) -> None:
    """Raises Refused(TOO_LARGE or QUOTA).

    new: has no outputs yet. prompt: u32 [n]. tokens: positions that an output can come to need.
    """
    size, usable = core.page_size, core.pages.usable
    coming = {
        source.pin.key: source.outputs[0].prompt_length // size
        for source in unfinished
        if source.pin is not None and source.pin.key not in core.rows.pinned
    }
    pinned = len(core.pins.pages) + sum(coming.values())
    if new.pin is not None and new.pin.key not in coming:
        _check_pin(core, unfinished, pinned + len(prompt) // size, len(core.rows.pinned) + len(coming))
    need = -(-tokens // size)
    if need > usable - pinned:
        shared = core.pins.pages.intersection(match_pages(core.tables, core.pages.index, new.root, prompt).tolist())
        if need > usable - pinned + len(shared):
            message = f"{tokens} tokens do not fit beside pinned prefixes of {pinned * size} tokens; {REMEDY}"
            raise Refused(Refusal.TOO_LARGE, message)


def _check_pin(core: ManagerCore, unfinished: list[Source], pinned: int, names: int) -> None:
    """pinned: pages with the new one's; names: without it."""
    if names >= MOST_PINS:
        raise Refused(Refusal.QUOTA, f"{MOST_PINS} prefixes are pinned, which is the most; {REMEDY}")
    largest = max((source.outputs[0].capacity - 1 for source in unfinished), default=0)
    if pinned > min(core.pins.most_pages, core.pages.usable - -(-largest // core.page_size)):
        raise Refused(Refusal.QUOTA, f"{pinned} pages would be pinned, more than the pool can spare; {REMEDY}")
