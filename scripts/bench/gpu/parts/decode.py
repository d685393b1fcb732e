"""Decode attention over a grid of batches and contexts, beside the memory's rates and other engines' kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from gpu.job import Job
from gpu.ours import Ours
from gpu.parts.copy import PageRead, copy_rate
from gpu.peers import Case, Peer, available, peer_seconds
from gpu.pool import LAYOUTS, Pool, Shape, pages_and_layers

# Of the K/V's type: its name, and the share of the copy rate that is wanted from LARGE bytes a launch on.
TYPES: Final = {torch.bfloat16: ("bfloat16", 0.90), torch.float8_e4m3fn: ("fp8", 0.85)}
OF_READ: Final = 0.95  # wanted below LARGE
LARGE: Final = 1e9
_POOL_SHARE: Final = 0.8  # of free memory
_SPARE_SECONDS: Final = 8.0  # what a row may take


@dataclass(frozen=True, slots=True)
class Grid:
    """batches and contexts: the rest of the grid is for each pair."""

    groups: tuple[int, ...] = (4, 8)
    batches: tuple[int, ...] = (32, 64, 128, 256)
    contexts: tuple[int, ...] = (2048, 8192, 32768)
    layers: int = 32


TINY: Final = Grid((4,), (2,), (40,), 2)


def run(job: Job) -> None:
    bed, grid = job.bed, TINY if job.options.tiny else Grid()
    rate, read = copy_rate(bed), PageRead(bed)
    job.emit("rates", ("device copy, in the decode part",), gb_s=rate / 1e9)
    peers, missing = available(job.options.fa3)
    for text in missing:
        job.note(text)
    # The layout that is served comes first: time may end before the grid does.
    for layout in reversed(LAYOUTS):
        for dtype in TYPES:
            budget = 1 << 22 if job.options.tiny else int(bed.free_bytes() * _POOL_SHARE)
            for batch, context in [(b, c) for c in grid.contexts for b in grid.batches]:
                if job.left() < _SPARE_SECONDS:
                    job.note("the part's time ended before the grid did")
                    return
                _pair(job, Shape(dtype), layout, batch, context, grid, budget, rate, read, peers)


def _pair(
    job: Job,
    shape: Shape,
    layout: str,
    batch: int,
    context: int,
    grid: Grid,
    budget: int,
    rate: float,
    read: PageRead,
    peers: list[Peer],
) -> None:
    """All groups of one pool."""
    bed, contexts = job.bed, np.full(batch, context, np.int64)
    needed = -(-contexts // shape.page_size)
    name, wanted = TYPES[shape.dtype]
    try:
        pages, layers = pages_and_layers(bed, shape, int(needed.sum()), budget, grid.layers)
    except ValueError as reason:
        job.note(f"{name}, {layout}, batch {batch}, context {context}: {reason}")
        return
    pool = Pool(bed, shape, pages, layers, layout)
    tables, nbytes = pool.tables(contexts, seed=batch + context), shape.needed_bytes(contexts)
    turns = range(layers)
    read_rate = nbytes / read.seconds(pool, tables, needed, turns)
    for group in grid.groups:
        heads = group * shape.kv_heads
        queries = torch.randn(batch, heads, shape.head_dim, device=bed.torch_device).bfloat16()
        case = Case(queries, tables, contexts, np.ones(batch, np.int64))
        ours = Ours(bed, pool, heads, "decode")
        ours.prepare(case)
        error = ours.error()
        seconds = bed.seconds(ours.launches(turns))
        found = {peer.name: peer_seconds(job, peer, case, pool, turns) for peer in peers}
        moved = nbytes / seconds
        share = moved / (wanted * rate) if nbytes >= LARGE else moved / (OF_READ * read_rate)
        job.emit(
            "decode",
            (name, layout, str(group), str(batch), str(context)),
            gb=nbytes / 1e9,
            seconds=seconds,
            gb_s=moved / 1e9,
            of_copy=moved / rate,
            of_read=moved / read_rate,
            plan=ours.plan_seconds,
            error=error,
            aim="met" if share >= 1 else "missed",
            **found,
        )
