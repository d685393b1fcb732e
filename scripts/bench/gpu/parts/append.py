"""Append attention: chunks of prompts behind cached prefixes, beside other engines' kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from gpu.job import Job
from gpu.ours import Ours
from gpu.peers import Case, available, peer_seconds
from gpu.pool import Pool, Shape

WANTED: Final = 0.60  # of FlashAttention-3's rate


@dataclass(frozen=True, slots=True)
class Sizes:
    """cases: sequences, tokens of each one's chunk, tokens before it."""

    cases: tuple[tuple[int, int, int], ...] = ((1, 2048, 8192), (4, 2048, 8192), (1, 2048, 0), (16, 512, 2048))
    groups: tuple[int, ...] = (4, 8)
    layers: int = 8


TINY: Final = Sizes(((2, 9, 20),), (4,), 1)


def flops(case: Case, heads: int, head_dim: int) -> float:
    """Of the two products, over the keys that are seen."""
    seen = case.counts * (case.contexts - case.counts) + case.counts * (case.counts + 1) / 2
    return float(4 * heads * head_dim * seen.sum())


def run(job: Job) -> None:
    bed, sizes, shape = job.bed, TINY if job.options.tiny else Sizes(), Shape()
    peers, missing = available(job.options.fa3)
    for text in missing:
        job.note(text)
    for sequences, chunk, prefix in sizes.cases:
        contexts = np.full(sequences, prefix + chunk, np.int64)
        pages = 4 * int((-(-contexts // shape.page_size)).sum())
        pool = Pool(bed, shape, pages, sizes.layers, "layer-major")
        for group in sizes.groups:
            heads = group * shape.kv_heads
            queries = torch.randn(sequences * chunk, heads, shape.head_dim, device=bed.torch_device).bfloat16()
            case = Case(queries, pool.tables(contexts), contexts, np.full(sequences, chunk, np.int64))
            ours = Ours(bed, pool, heads, "append")
            ours.prepare(case)
            error = ours.error()
            seconds = bed.seconds(ours.launches(range(sizes.layers)))
            found = {peer.name: peer_seconds(job, peer, case, pool, range(sizes.layers)) for peer in peers}
            of_fa3 = fa3 / seconds if (fa3 := found.get("fa3")) else None
            job.emit(
                "append",
                (str(group), str(sequences), str(chunk), str(prefix)),
                seconds=seconds,
                tflop_s=flops(case, heads, shape.head_dim) / seconds / 1e12,
                error=error,
                of_fa3=of_fa3,
                aim=None if of_fa3 is None or prefix < 8192 else "met" if of_fa3 >= WANTED else "missed",
                **found,
            )
        del pool
