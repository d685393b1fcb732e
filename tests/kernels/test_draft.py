"""The search for drafts against a naive one, and how drafts are put behind the chunks of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels.cpu.native import NativeModel, available_isas
from tests.kernels.variants import Variant, as_chunks

LEAST, MOST = 2, 16  # tokens that are equal


@pytest.fixture(scope="module")
def sampler() -> Iterator[NativeModel]:
    model = Variant(available_isas()[0], None).sampler(10)
    yield model
    model.close()


def continuation(tokens: list[int]) -> int:
    """The place behind the most of the last tokens, the latest of several; len(tokens) for none."""

    def equal(place: int) -> int:
        count = 0
        while count < min(place, MOST) and tokens[place - 1 - count] == tokens[-1 - count]:
            count += 1
        return count

    best = max(range(1, len(tokens)), key=lambda place: (equal(place), place), default=0)
    return best if best and equal(best) >= LEAST else len(tokens)


def drafted(tokens: list[int], most: int) -> list[int]:
    place, longer = continuation(tokens), list(tokens)
    for _ in range(most if place < len(tokens) else 0):
        longer.append(longer[place])
        place += 1
    return longer[len(tokens) :]


def draft(model: NativeModel, sequences: list[list[int]], wanted: list[int], room: int) -> list[list[int]]:
    """What is put behind each; checks that nothing else is."""
    held = [np.array(tokens + [99] * (most + 1), np.uint32) for tokens, most in zip(sequences, wanted, strict=True)]
    known = [len(tokens) for tokens in sequences]
    chunks = as_chunks([(array.ctypes.data, 0, 0, n - 1, 1, n - 1, 1) for array, n in zip(held, known, strict=True)])
    drafts = np.array(wanted, np.uint32)
    total = model.draft(chunks, drafts, room)
    assert total == drafts.sum() <= room
    found = []
    for array, n, count, chunk, tokens in zip(held, known, drafts.tolist(), chunks, sequences, strict=True):
        assert (chunk["start"], chunk["count"], chunk["sample"], chunk["write_from"]) == (
            n - 1,
            1 + count,
            1 + count,
            n - 1,
        )
        assert array[:n].tolist() == tokens and set(array[n + count :].tolist()) == {99}
        found.append(array[n : n + count].tolist())
    return found


few = st.lists(st.integers(0, 3), min_size=1, max_size=300)
repeated = st.builds(lambda part, times, end: part * times + end, few, st.integers(1, 4), few)


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(tokens=st.one_of(few, repeated, st.lists(st.integers(0, 40), min_size=1, max_size=300)), most=st.integers(0, 20))
@example([5], 3)
@example([5, 5], 3)
@example([5, 5, 5], 3)
@example([5, 5, 5, 5], 3)
@example([1, 2, 3, 1, 2], 9)
@example([1, 2, 3, 4, 1, 2, 3], 9)
@example([9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], 1)  # the longer of two, not the later
@example([9, 1, 2, 3, 9, 1, 2, 4, 9, 1, 2], 1)  # the later of two equal ones
def test_as_a_naive_search(sampler: NativeModel, tokens: list[int], most: int) -> None:
    assert draft(sampler, [tokens], [most], 100) == [drafted(tokens, most)]


def test_a_long_text(sampler: NativeModel) -> None:
    """Three tokens are the last ones of 8,192, wherever in a block they stand."""
    tokens = np.random.default_rng(1).permutation(np.arange(10, 8202)).tolist()
    for place in (*range(67), 4000, *range(8192 - 3 - 67, 8192 - 6)):
        again = tokens[:-3] + tokens[place : place + 3]
        assert draft(sampler, [again], [2], 100) == [again[place + 3 : place + 5]]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    sequences=st.lists(st.tuples(few, st.integers(0, 9)), min_size=1, max_size=8),
    room=st.integers(0, 40),
)
def test_room_is_shared(sampler: NativeModel, sequences: list[tuple[list[int], int]], room: int) -> None:
    """One in turn for each that finds any; nobody gets another's."""
    wanted = [drafted(tokens, most) for tokens, most in sequences]
    shares = [(rank, i) for i, drafts in enumerate(wanted) for rank in range(len(drafts))]
    given_out = Counter(i for _, i in sorted(shares)[:room])
    found = draft(sampler, [tokens for tokens, _ in sequences], [most for _, most in sequences], room)
    assert found == [drafts[: given_out[i]] for i, drafts in enumerate(wanted)]
