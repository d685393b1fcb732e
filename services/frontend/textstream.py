"""Tokens to text, one at a time: never half a character, never past a stop string.

T(k), the text of the first k tokens, is a fold over them: whoever feeds the same tokens gets the
same text, however they came. What is held back:

    ......... shown ........|.. may begin a stop string ..|.. bytes of an unfinished character ..
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

_REPLACEMENT: Final = "\ufffd"
# A character has at most four bytes; more unfinished tokens than this are bytes that never will be one.
_MOST_PENDING: Final = 8


class Decoder(Protocol):
    """What a tokenizer is here."""

    special_ids: frozenset[int]  # tokens that have no text

    def decode(self, ids: Sequence[int], /) -> str: ...


class Detokenizer:
    """Amortized O(1) a token: decodes a short window, whose start lags behind what was shown.

    With a byte-level decoder all that it gives equals the decoding of all tokens at once, valid
    UTF-8 or not. Decoders with byte fallback judge a run of bytes as a whole: what is no UTF-8
    there may show more or fewer replacement characters.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decode = decoder.decode
        self._special = decoder.special_ids
        self._window: list[int] = []
        self._shown = 0  # tokens of the window whose text is out already
        self._shown_text = ""

    def feed(self, token: int) -> str:
        """The text that has become final."""
        if token in self._special:
            return ""  # as context it would make the next token a first one, which some decoders trim
        self._window.append(token)
        text = self._decode(self._window)
        unfinished = text.endswith(_REPLACEMENT)
        crowded = len(self._window) - self._shown > _MOST_PENDING
        if unfinished and not crowded:
            return ""
        # Even of broken bytes the last may begin a character.
        final = text[:-1] if unfinished else text
        new = final[len(self._shown_text) :]
        if new or crowded:
            # The tokens just shown stay as context: some decoders treat a first token differently.
            self._window = self._window[self._shown :]
            self._shown = len(self._window)
            self._shown_text = self._decode(self._window)
            if unfinished:
                self._shown_text = self._shown_text[:-1]
        return new

    def flush(self) -> str:
        """What is left at the end, unfinished or not."""
        new = self._decode(self._window)[len(self._shown_text) :]
        self._window, self._shown, self._shown_text = [], 0, ""
        return new


class TextStream:
    """One output's text, with its stop strings."""

    def __init__(self, decoder: Decoder, stops: Sequence[str], min_tokens: int = 0) -> None:
        """stops: the text ends before the first match. The text of the first `min_tokens` tokens is not searched."""
        self._detokenizer = Detokenizer(decoder)
        self._stops = tuple(stops)
        self._min_tokens = min_tokens
        self._held = ""
        self.length = 0  # tokens fed
        self.stopped = False  # at `length`

    def feed(self, token: int) -> str:
        """The text that this token adds to what may be shown. Nothing may be fed once `stopped`."""
        self.length += 1
        return self._search(self._detokenizer.feed(token))

    def finish(self) -> str:
        """The output ends here: whatever was held back, unless a stop string shows up in it."""
        if self.stopped:
            return ""
        shown = self._search(self._detokenizer.flush())
        held, self._held = self._held, ""
        return shown + held

    def _search(self, new: str) -> str:
        """What may be shown of the text held and of `new`."""
        if not self._stops or self.length <= self._min_tokens:
            return new
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
    """Length of the longest end of `text` that begins `stop` and is not all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0
