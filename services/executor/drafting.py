"""How many drafts a sequence may try in its next step, after what became of those before.

A draft is a guess at a token that is computed along with the step, and kept where it is what would have been
sampled. So this costs or saves time and changes no token: a successor may begin afresh.

    all were right      twice as many next time
    some were right     one more than that
    none was right      half as many, at once after the first time, after a rest that doubles with each further one
"""

from __future__ import annotations

from typing import Final

_FIRST: Final = 15  # an answer that begins with a copy goes on with it
_LONGEST_REST: Final = 6  # as a power of two: tokens


class Drafting:
    """One sequence's."""

    __slots__ = ("_misses", "allowed", "resumes_at")

    def __init__(self) -> None:
        self.allowed = _FIRST
        self.resumes_at = 0  # no drafts while `known` is below this
        self._misses = 0  # in a row

    def learn(self, known: int, tried: int, right: int, most: int) -> None:
        """known: after the step. tried: drafts, at least one. right: how many of them were. most: ever allowed."""
        if right == tried:
            self.allowed = min(max(self.allowed, 2 * tried), most)
        elif right:
            self.allowed = min(right + 1, most)
        else:
            self.allowed = max(self.allowed // 2, 1)
        self._misses = 0 if right else min(self._misses + 1, _LONGEST_REST)
        if self._misses > 1:
            self.resumes_at = known + (1 << self._misses) - 2
