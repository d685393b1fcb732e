"""The versions of the decode kernel, one beside the other."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import torch

from gpu.job import Job
from gpu.ours import Ours
from gpu.parts.copy import copy_rate
from gpu.peers import Case
from gpu.pool import Pool, Shape

_VERSIONS: Final[dict[str, Literal[1, 2] | None]] = {
    "v1: a block a query head": 1,
    "v2: grouped heads on the matrix units": 2,
    "v3: pipelined, split": None,
}
_CASES: Final = ((32, 2048), (32, 8192), (256, 2048))
_GROUP: Final = 4


def run(job: Job) -> None:
    bed, shape, tiny = job.bed, Shape(), job.options.tiny
    rate = copy_rate(bed)
    for batch, context in ((2, 40),) if tiny else _CASES:
        contexts = np.full(batch, context, np.int64)
        needed = int((-(-contexts // shape.page_size)).sum())
        pool = Pool(bed, shape, 2 * needed, 2 if tiny else 8, "page-major")
        heads = _GROUP * shape.kv_heads
        queries = torch.randn(batch, heads, shape.head_dim, device=bed.torch_device).bfloat16()
        case = Case(queries, pool.tables(contexts), contexts, np.ones(batch, np.int64))
        for name, version in _VERSIONS.items():
            ours = Ours(bed, pool, heads, "decode", version)
            ours.prepare(case)
            error = ours.error()
            seconds = bed.seconds(ours.launches(range(pool.layers)))
            moved = shape.needed_bytes(contexts) / seconds
            labels = (name, str(batch), str(context))
            job.emit("ladder", labels, seconds=seconds, gb_s=moved / 1e9, of_copy=moved / rate, error=error)
        del pool
