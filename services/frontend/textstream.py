"""Tokens to text, one at a time: never half a character, never past a stop string.

T(k), the text of the first k tokens, is a fold over them: whoever feeds the same tokens gets the
same text, however they came. What is held back:

    ......... shown ........|.. may begin a stop string ..|.. bytes of an unfinished character ..
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

_REPLACEMENT: Final = "\ufffd"
# A character has at most four bytes; more unfinished tokens than this are bytes that never will be one.
_MOST_PENDING: Final = 8


class Detokenizer:
    """Amortized O(1) a token: decodes a short window, whose start lags behind what was shown."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = 0  # tokens of the window whose text is out already
        self._shown_text = ""

    def feed(self, token: int) -> str:
        """The text that has become final."""
        self._window.append(token)
        text = self._decode(self._window)
        pending = len(self._window) - self._shown
        if text.endswith(_REPLACEMENT) and pending <= _MOST_PENDING:
            return ""
        new = text[len(self._shown_text) :]
        if new or pending > _MOST_PENDING:
            # The tokens just shown stay as context: some decoders treat a first token differently.
            self._window = self._window[self._shown :]
            self._shown = len(self._window)
            self._shown_text = self._decode(self._window)
        return new

    def flush(self) -> str:
        """What is left at the end, unfinished or not."""
        new = self._decode(self._window)[len(self._shown_text) :]
        self._window, self._shown, self._shown_text = [], 0, ""
        return new


class TextStream:
    """One output's text, with its stop strings."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str], min_tokens: int = 0) -> None:
        """stops: the text ends before the first match. The text of the first `min_tokens` tokens is not searched."""
        self._detokenizer = Detokenizer(decode)
        self._stops = tuple(stops)
        self._min_tokens = min_tokens
        self._held = ""
        self.length = 0  # tokens fed
        self.stopped = False  # at `length`

    def feed(self, token: int) -> str:
        """The text that this token adds to what may be shown. Nothing may be fed once `stopped`."""
        self.length += 1
        new = self._detokenizer.feed(token)
        if self.length <= self._min_tokens or not self._stops:
            return new
        return self._search(new)

    def finish(self) -> str:
        """The output ends here: whatever was held back, unless a stop string shows up in it."""
        if self.stopped:
            return ""
        rest = self._detokenizer.flush()
        shown = self._search(rest) if self._stops else rest
        if self.stopped:
            return shown
        held, self._held = self._held, ""
        return shown + held

    def _search(self, new: str) -> str:
        text = self._held + new
        found = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped = True
            self._held = ""
            return text[:found]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
