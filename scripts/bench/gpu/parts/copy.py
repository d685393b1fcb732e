"""The rates that everything else is held against: a device copy, and plain reads of pages in random order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch

from gpu.bed import Bed
from gpu.job import Job
from gpu.pool import LAYOUTS, Pool, Shape, pages_and_layers
from kernels.cuda.device import Grid, address

SOURCE: Final = str(Path(__file__).resolve().parents[1] / "page_read.cu")
_THREADS: Final = 128
_COPY_BYTES: Final = 8 << 30
_READ_BYTES: Final = 1 << 30  # of one launch
_POOL_SHARE: Final = 0.85  # of free memory: translations of addresses are part of the question


def copy_rate(bed: Bed) -> float:
    """Bytes a second, read plus written, of the largest copy that is worth its memory.

    The better of a copy in a graph and one outside: a graph's node may take another engine (2.8 against 4.3 TB/s seen).
    """
    size = min(_COPY_BYTES, bed.free_bytes() // 4)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bed.torch_device)
    target = torch.empty_like(source)
    copies = [partial(target.copy_, source)]
    return 2 * size / min(bed.seconds(copies), bed.seconds(copies, graph=False))


class PageRead:
    """Reads K and V of whole pages, and computes nothing."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.kernel = bed.kernels.kernel(SOURCE, "page_read", {"UNROLL": 8}, _THREADS)
        self.blocks = bed.kernels.multiprocessors * self.kernel.blocks_per_multiprocessor
        self.sink = bed.scratch(16)

    def seconds(self, pool: Pool, tables: np.ndarray, needed: np.ndarray, layers: Sequence[int]) -> float:
        """One launch over the first `needed` pages of each row of `tables`, another layer each time."""
        chosen = tables[np.arange(tables.shape[1]) < needed[:, None]]
        pages = torch.from_numpy(chosen).to(self.bed.torch_device)
        grid = Grid(min(self.blocks, 2 * len(chosen)))

        def launch(layer: int) -> None:
            self.kernel.launch(
                grid,
                (
                    address(pool.address(layer)),
                    address(pages.data_ptr()),
                    np.int32(len(chosen)),
                    np.int64(pool.page_stride),
                    np.int64(pool.half_stride),
                    np.int32(pool.shape.half_bytes),
                    address(self.sink.data_ptr()),
                ),
            )

        return self.bed.seconds([partial(launch, layer) for layer in layers])


def run(job: Job) -> None:
    bed = job.bed
    job.emit("rates", ("device copy",), gb_s=copy_rate(bed) / 1e9)
    read, shape = PageRead(bed), Shape()
    for share in (0.1, _POOL_SHARE):
        for layout in LAYOUTS:
            budget = int(bed.free_bytes() * share)
            wanted = 8 if job.options.tiny else _READ_BYTES // (2 * shape.half_bytes)
            pages, layers = pages_and_layers(bed, shape, wanted, budget, 2 if job.options.tiny else 32)
            pool = Pool(bed, shape, pages, layers, layout)
            tables = pool.tables(np.array([wanted * shape.page_size]))
            seconds = read.seconds(pool, tables, np.array([wanted]), range(layers))
            rate = wanted * 2 * shape.half_bytes / seconds
            job.emit("rates", (f"pages at random, {layout}, pool of {budget / 1e9:.0f} GB",), gb_s=rate / 1e9)
            del pool
