"""How many drafts a sequence may try in its next step, after what became of those before.

A draft is a guess at a token that is computed along with the step, and kept where it is what would have been
sampled. So this costs or saves time and changes no token: a successor may begin afresh.

    all were right      twice as many next time
    some were right     one more than that
    none was right      half as many, at once after the first time, after a rest that doubles with each further one

Where each draft has to earn its own row, a sequence tries those that are likely to be right: as many as its record
makes of them. Without one it tries a single draft now and then.
"""

from __future__ import annotations

from typing import Final

_FIRST: Final = 15  # an answer that begins with a copy goes on with it
_LONGEST_REST: Final = 6  # as a power of two: tokens

_LIKELY: Final = 0.65  # the chance from which on a draft earns its row: the time of one over that of a token without
_OLDER: Final = 0.8  # what counts for 1 in a step counts for so much in the next with drafts
_SHORTEST_PAUSE: Final = 8  # tokens between single drafts, doubled each time
_LONGEST_PAUSE: Final = 128


class Drafting:
    """One sequence's."""

    __slots__ = ("_misses", "_pause", "_right", "_wrong", "allowed", "likely", "probes_at", "resumes_at")

    def __init__(self) -> None:
        self.allowed = _FIRST
        self.resumes_at = 0  # no drafts while `known` is below this
        self.likely = 0  # how many are all right with a chance of _LIKELY
        self.probes_at = 0  # while none is likely: when one may be tried
        self._misses = 0  # in a row
        self._pause = _SHORTEST_PAUSE
        # Drafts; and such as were wrong, one a step at most, for those behind it say nothing.
        self._right, self._wrong = 0.0, 0.5

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
        self._judge(known, tried, right, most)

    def _judge(self, known: int, tried: int, right: int, most: int) -> None:
        self._right = self._right * _OLDER + right
        self._wrong = self._wrong * _OLDER + (right < tried)
        chance = self._right / (self._right + self._wrong)
        self.likely, all_right = 0, chance
        while all_right >= _LIKELY and self.likely < most:
            self.likely += 1
            all_right *= chance
        if self.likely:
            self._pause = _SHORTEST_PAUSE
        else:
            self.probes_at = known + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
