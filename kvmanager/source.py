"""What the core needs of a request's record."""

from __future__ import annotations

from dataclasses import dataclass

from kvmanager.layout import OutputLog
from kvmanager.pins import Pin
from kvmanager.prefix import Hash


@dataclass(frozen=True, slots=True)
class Source:
    """Its outputs' logs, where its hash chains start, and the name under which its prompt is to be pinned."""

    outputs: list[OutputLog]
    root: Hash
    pin: Pin | None = None
