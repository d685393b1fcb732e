"""The version of the internal messages. Both ends of a connection may be one apart, for a rolling upgrade.

What is new in version N must be ignored by N - 1 and may be missing from it: fields are added, never changed.
Files in shared memory are another matter: they have a layout version of their own, which must be the same.
"""

from __future__ import annotations

from typing import Final

# 0: before messages said a version.
PROTOCOL: Final = 1


def skew(ours: str, theirs: str, version: int) -> str:
    """Why a peer of this version cannot be spoken to; empty when it can. ours, theirs: names of the components."""
    if abs(version - PROTOCOL) <= 1:
        return ""
    older, newer = (theirs, ours) if version < PROTOCOL else (ours, theirs)
    return (
        f"this {ours} speaks version {PROTOCOL} of the internal protocol and the {theirs} version {version}, but they "
        f"may be one apart only: upgrade the {older}, or start the release before this one of the {newer}"
    )
