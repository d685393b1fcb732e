"""The executor's calls about rows, as the manager's protocol has them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pagehold.kv.v1 import kv_manager_pb2 as kv
from services.executor.sequence import Sequence

_HEADROOM_PAGES: Final = 2


def ensure(sequence: Sequence, page_size: int, keep_free: int) -> kv.Call:
    """A row for all that is known and one token more."""
    need, headroom = _want(sequence, page_size)
    return kv.Call(
        ensure=kv.EnsureRequest(
            key=sequence.request.key, index=sequence.index, capacity=need, headroom=headroom, keep_free=keep_free
        )
    )


def fork(sequence: Sequence, source: Sequence, page_size: int, keep_free: int) -> kv.Call:
    """The same, over the prompt's pages of a sibling that has computed them."""
    need, headroom = _want(sequence, page_size)
    return kv.Call(
        fork=kv.ForkRequest(
            key=sequence.request.key,
            index=sequence.index,
            from_index=source.index,
            from_row_generation=source.row_generation,
            length=sequence.prompt_length,
            capacity=need,
            headroom=headroom,
            keep_free=keep_free,
        )
    )


def ensure_rows(sequences: Iterable[Sequence], page_size: int) -> kv.Call:
    """More pages for many rows, those in front first. One message of four columns, however many rows."""
    rows: list[int] = []
    generations: list[int] = []
    capacities: list[int] = []
    headrooms: list[int] = []
    for sequence in sequences:
        need, headroom = _want(sequence, page_size)
        rows.append(sequence.row)
        generations.append(sequence.row_generation)
        capacities.append(need)
        headrooms.append(headroom)
    return kv.Call(
        ensure_rows=kv.EnsureRowsRequest(
            rows=rows, row_generations=generations, capacities=capacities, headrooms=headrooms
        )
    )


def trim(sequence: Sequence, capacity: int) -> kv.Call:
    """Gives unwritten pages beyond `capacity` tokens back."""
    return kv.Call(
        trim=kv.TrimRequest(
            key=sequence.request.key,
            index=sequence.index,
            row_generation=sequence.row_generation,
            capacity=capacity,
        )
    )


def close(sequence: Sequence) -> kv.Call:
    """Gives the row back."""
    return close_row(sequence.request.key, sequence.index, sequence.row_generation)


def close_row(key: str, index: int, row_generation: int) -> kv.Call:
    """The same for a row that no sequence has."""
    return kv.Call(close=kv.CloseRequest(key=key, index=index, row_generation=row_generation))


def _want(sequence: Sequence, page_size: int) -> tuple[int, int]:
    """Tokens that the row must hold for the step after next, and headroom up to what it can ever need."""
    need = min(sequence.known + 1, sequence.limit)
    return need, min(_HEADROOM_PAGES * page_size, sequence.limit - need)
