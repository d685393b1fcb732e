"""A row that the manager has granted becomes its sequence's: bound, what is copied copied, `computed` set.

    tokens   0 ............. shared ............ + copied ......... known
             | whole pages of   | slots of another  | computed by
             | other rows       | page: copied here | coming steps
             | never written    | the row's own pages

The copy is done on the step thread, in the order of the manager's answers. Every K/V write into a page
follows a later answer, and the page's word changes before the page is handed out: as long as the word
has not changed, the slots are what the manager saw.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime import failpoint
from services.executor.runner.base import Runner
from services.executor.sequence import Sequence
from services.executor.shared import SharedPool


@dataclass(frozen=True, slots=True)
class Grant:
    """The manager's answer to `ensure` or `fork`."""

    row: int
    generation: int  # 0: the row that was to be forked is gone
    capacity: int  # tokens
    shared: int  # tokens, in whole pages
    copy: kv.PageCopy | None  # into the first page that is not shared
    source: Sequence | None = None  # the sibling that it is a fork of


GONE = Grant(0, 0, 0, 0, None)


def of_ensure(response: kv.EnsureResponse) -> Grant:
    copy = response.copy if response.HasField("copy") else None
    return Grant(response.row, response.row_generation, response.capacity, response.cached_tokens, copy)


def of_fork(response: kv.ForkResponse, source: Sequence | None) -> Grant:
    copy = response.copy if response.HasField("copy") else None
    return Grant(response.row, response.row_generation, response.capacity, response.shared_tokens, copy, source)


def settle(sequence: Sequence, grant: Grant, pool: SharedPool, runner: Runner) -> None:
    """Afterwards the sequence can run."""
    failpoint.hit("executor.grant.before")
    sequence.row, sequence.row_generation, sequence.capacity = grant.row, grant.generation, grant.capacity
    pool.bind(sequence)
    sequence.settle(pool.usable_computed(sequence))
    copied = _copy(sequence, grant, pool, runner) if grant.copy is not None else 0
    if not sequence.preempted and not sequence.length:
        # Of the prompt alone: what a later row finds cached is the sequence's own work as well. A fork
        # shares what a sibling has found or computed; found is only what the sibling has found.
        cached = grant.source.cached_tokens if grant.source is not None else grant.shared + copied
        sequence.cached_tokens = cached
        sequence.log.set_cached_tokens(cached)
    runner.prepare(sequence.lane, sequence.committed)


def _copy(sequence: Sequence, grant: Grant, pool: SharedPool, runner: Runner) -> int:
    """Copies the leading slots of a page into the row's first page of its own; how many.

    None where the page holds something else by now: those tokens are computed like all others.
    """
    copy, border, known = grant.copy, grant.shared, sequence.committed
    assert copy is not None
    count = min(copy.tokens, pool.page_size, known - border)
    # Below `computed` nothing is written again, so only a row that is computed up to the border takes a copy.
    if count <= 0 or sequence.computed != border or border >= grant.capacity or not pool.still_holds(copy):
        return 0
    failpoint.hit("executor.copy.before")
    runner.copy_slots(copy.page, pool.page_at(sequence, border), count)
    failpoint.hit("executor.copy.after")
    sequence.log.set_progress(border + count, known)
    sequence.settle(border + count)
    return count
