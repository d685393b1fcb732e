"""What the core grants, and why it refuses, as messages."""

from __future__ import annotations

import numpy as np

from kvmanager.core import Granted, ManagerCore
from kvmanager.errors import Refusal, Refused
from kvmanager.layout import Header
from kvmanager.pool import Pool
from pagehold.kv.v1 import kv_manager_pb2 as kv


def error_reply(refused: Refused) -> kv.Reply:
    return kv.Reply(error=kv.Error(reason=f"ERROR_REASON_{refused.reason.name}", message=str(refused)))


def ensure_rows(core: ManagerCore, ask: kv.EnsureRowsRequest) -> kv.EnsureRowsResponse:
    """Raises Refused."""
    columns = [np.fromiter(column, np.int64, len(column)) for column in (ask.rows, ask.capacities, ask.headrooms)]
    generations = np.fromiter(ask.row_generations, np.uint64, len(ask.row_generations))
    if len({len(generations), *map(len, columns)}) > 1:
        raise Refused(Refusal.INVALID, "the columns of `ensure_rows` differ in length")
    rows, capacities, headrooms = columns
    return kv.EnsureRowsResponse(capacities=core.ensure_rows(rows, generations, capacities, headrooms).tolist())


def ensure(core: ManagerCore, ask: kv.EnsureRequest) -> kv.EnsureResponse:
    granted = core.ensure(ask.key, ask.index, ask.capacity, ask.headroom, ask.keep_free)
    return kv.EnsureResponse(
        row=granted.row,
        row_generation=granted.generation,
        capacity=granted.capacity,
        cached_tokens=granted.cached,
        copy=_copy(granted),
    )


def fork(core: ManagerCore, ask: kv.ForkRequest) -> kv.ForkResponse:
    parent = (ask.from_index, ask.from_row_generation, ask.length)
    granted = core.fork(ask.key, ask.index, *parent, ask.capacity, ask.headroom, ask.keep_free)
    return kv.ForkResponse(
        row=granted.row,
        row_generation=granted.generation,
        capacity=granted.capacity,
        shared_tokens=granted.cached,
        copy=_copy(granted),
    )


def _copy(granted: Granted) -> kv.PageCopy | None:
    copy = granted.copy
    return kv.PageCopy(page=copy.page, page_generation=copy.generation, tokens=copy.tokens) if copy else None


def export(pool: Pool) -> kv.Export | None:
    """None: the pool is a file."""
    if pool.memory is None:
        return None
    made = pool.memory.export
    return kv.Export(
        kind=kv.PoolKind.Name(made.kind),
        handle=made.handle,
        offset=made.offset,
        size=made.nbytes,
        pool_uuid=pool.uuid,
        generation=pool.word(Header.POOL_GENERATION),
        device_uuid=made.device,
    )
