"""Text is a pure function of the tokens: equal to decoding them at once, and safe at every prefix."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.frontend.textstream import Detokenizer, TextStream
from services.frontend.tokenizer import ModelTokenizer
from tests.unit.frontend.world import EOS, byte_fallback, byte_level, described

BYTE_LEVEL = ModelTokenizer(described(byte_level()))
BYTE_FALLBACK = ModelTokenizer(described(byte_fallback()))
VOCABULARY = byte_level().get_vocab_size()

EMOJI = "👩‍👩‍👧‍👦 🏳️‍🌈 日本語 нет €"
texts = st.text() | st.text(alphabet="abthe 😀€н�")
any_tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=60)


def prefixes(tokenizer: ModelTokenizer, ids: Sequence[int]) -> list[str]:
    """What has been shown after each token, and at the end."""
    detokenizer = Detokenizer(tokenizer)
    shown = [""]
    for token in ids:
        shown.append(shown[-1] + detokenizer.feed(token))
    return [*shown, shown[-1] + detokenizer.flush()]


@settings(deadline=None)
@given(any_tokens)
def test_equals_decoding_at_once_valid_or_not(ids: list[int]) -> None:
    assert prefixes(BYTE_LEVEL, ids)[-1] == BYTE_LEVEL.decode(ids)


@settings(deadline=None)
@given(st.lists(st.integers(128, 255), max_size=40), st.integers(0, 3))
def test_long_runs_of_broken_bytes(data: list[int], specials: int) -> None:
    alphabet = byte_level().get_vocab()
    table = _bytes_to_unicode()
    ids = [alphabet[table[byte]] for byte in data]
    ids[len(ids) // 2 : len(ids) // 2] = [EOS] * specials * 5  # with tokens in the middle that have no text
    assert prefixes(BYTE_LEVEL, ids)[-1] == BYTE_LEVEL.decode(ids) == bytes(data).decode(errors="replace")


@settings(deadline=None)
@given(texts)
def test_never_half_a_character(text: str) -> None:
    """Whatever the merges: each prefix shown is a prefix of the text, character by character."""
    ids = BYTE_LEVEL.encode(text)
    for shown in prefixes(BYTE_LEVEL, ids):
        assert text.startswith(shown)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
def test_emoji(tokenizer: ModelTokenizer) -> None:
    ids = [3 + byte for byte in EMOJI.encode()] if tokenizer is BYTE_FALLBACK else tokenizer.encode(EMOJI)
    shown = prefixes(tokenizer, ids)
    assert shown[-1] == EMOJI
    assert all(EMOJI.startswith(one) for one in shown)
    assert len(set(shown)) == len(EMOJI) + 1, "each character is shown as soon as it is whole"


def test_the_context_keeps_spaces_that_a_first_token_would_lose() -> None:
    names = byte_fallback().get_vocab()
    ids = [names["▁the"], EOS, EOS, names["▁a"], names["▁"], names["▁"], names["b"], EOS, names["▁the"]]
    assert prefixes(BYTE_FALLBACK, ids)[-1] == BYTE_FALLBACK.decode(ids) == "the a  b the"


@settings(deadline=None)
@given(st.lists(st.integers(0, 264), max_size=40))
def test_byte_fallback_is_a_fold(ids: list[int]) -> None:
    """Broken bytes are judged as a run there, so no equality; but what was shown stays."""
    shown = prefixes(BYTE_FALLBACK, ids)
    assert all(after.startswith(before) for before, after in pairwise(shown))


def test_special_tokens_have_no_text() -> None:
    ids = [*BYTE_LEVEL.encode("ab"), EOS, *BYTE_LEVEL.encode("<|im_start|> the")]
    assert prefixes(BYTE_LEVEL, ids)[-1] == "ab the"


def test_work_is_linear() -> None:
    decoded = 0

    class Counting:
        special_ids: frozenset[int] = frozenset()

        def decode(self, ids: Sequence[int], /) -> str:
            nonlocal decoded
            decoded += len(ids)
            return BYTE_LEVEL.decode(ids)

    for token in (3, 200, EOS):  # text; a byte that is never a character; nothing at all
        decoded = 0
        detokenizer = Detokenizer(Counting())
        for _ in range(2000):
            detokenizer.feed(token)
        assert decoded < 2000 * 30


# --- stop strings ---


def run(ids: Sequence[int], stops: Sequence[str], min_tokens: int = 0) -> tuple[list[str], int | None]:
    """(text shown after each token and at the end, length at which a stop string ended it)"""
    stream = TextStream(BYTE_LEVEL, stops, min_tokens)
    shown = [""]
    for token in ids:
        shown.append(shown[-1] + stream.feed(token))
        if stream.stopped:
            return shown, stream.length
    shown.append(shown[-1] + stream.finish())
    return shown, stream.length if stream.stopped else None


def model(ids: Sequence[int], stops: Sequence[str], min_tokens: int) -> tuple[str, int | None]:
    """The definition, slowly: the first token with which the searched text holds a stop string."""
    free = BYTE_LEVEL.decode(ids[:min_tokens])
    for length in range(min_tokens + 1, len(ids) + 1):
        searched = BYTE_LEVEL.decode(ids[:length])[len(free) :]
        found = [at for stop in stops if (at := searched.find(stop)) >= 0]
        if found:
            return free + searched[: min(found)], length
    return BYTE_LEVEL.decode(ids), None


ab = st.text(alphabet="ab c", max_size=40)


@settings(deadline=None, max_examples=300)
@given(ab, st.lists(st.text(alphabet="ab c", min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 5))
def test_stop_strings(text: str, stops: list[str], min_tokens: int) -> None:
    ids = BYTE_LEVEL.encode(text)
    shown, stopped = run(ids, stops, min_tokens)
    assert (shown[-1], stopped) == model(ids, stops, min_tokens)
    for one in shown:
        assert shown[-1].startswith(one), "nothing is shown that a stop string takes back"
    if not min_tokens:
        assert not any(stop in shown[-1] for stop in stops)


def test_a_stop_string_over_many_tokens_and_inside_one() -> None:
    ids = BYTE_LEVEL.encode("one\n\nUser: two")
    shown, stopped = run(ids, ["\n\nUser:"])
    assert shown[-1] == "one"
    assert stopped == len(BYTE_LEVEL.encode("one\n\nUser:"))
    the = byte_level().get_vocab()["Ġthe"]
    assert run([the, the], ["h"])[0][-1] == " t"


def test_what_was_held_back_comes_when_it_is_no_stop_string() -> None:
    assert run(BYTE_LEVEL.encode("cab!"), ["ca!", "b?"])[0] == ["", "", "ca", "cab!", "cab!"]
    assert run(BYTE_LEVEL.encode("END"), ["ENDING"])[0] == ["", "", "", "", "END"]


def test_a_stop_string_in_what_the_end_reveals() -> None:
    """Half a character becomes a replacement character at the end, and that completes the stop string."""
    half = BYTE_LEVEL.encode("ok €")[:-1]
    shown, stopped = run(half, [" \ufffd"])
    assert shown[-1] == "ok"
    assert stopped == len(half)
    assert run(half, [" \ufffd"], min_tokens=len(half))[1] is None


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's table: printable bytes are themselves, the others lie above 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}
