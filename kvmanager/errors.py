"""Why the manager says no. A refused call has changed nothing."""

from __future__ import annotations

from enum import Enum, auto


class Refusal(Enum):
    """Named as in `pagehold.kv.v1.ErrorReason`."""

    ALREADY_EXISTS = auto()
    NOT_FOUND = auto()
    NO_PAGES = auto()
    NO_ROWS = auto()
    QUOTA = auto()
    STALE_EPOCH = auto()
    WRONG_MODEL = auto()
    NO_MEMORY = auto()
    INVALID = auto()
    TOO_LARGE = auto()
    PROTOCOL = auto()


class Refused(Exception):
    """The message is for operators; it is never sent to clients."""

    def __init__(self, reason: Refusal, message: str) -> None:
        super().__init__(message)
        self.reason = reason
