"""One captured graph for each padded number of decodes: a step is then one copy and one launch.

Warm-up runs on page 0, which no row ever holds, so it may be done over a pool with live pages. No lane is prepared
then, so their slots are free to be used as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch

from services.executor.runner.base import Chunk, Lane, SamplingParams
from services.executor.runner.cuda.batch import Batch, make_batch
from services.executor.runner.cuda.decoder import Decoder
from services.executor.runner.cuda.lanes import Lanes, Prepared
from services.executor.runner.cuda.limits import Limits
from services.executor.runner.cuda.platform import Platform
from services.executor.runner.cuda.pool import Pool
from services.executor.runner.cuda.staging import StepShape
from services.executor.runner.cuda.steps import Steps

_COMPARED: Final = 16  # rows: memory for more is better spent on pages
_TOLERANCE: Final = 0.05  # of the largest logit: inside a capture another algorithm may be chosen


def graph_sizes(most: int) -> tuple[int, ...]:
    """Padded numbers of decodes: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, … 256, 320, … and at last `most`."""
    steps = (1, 2, 4, 8, 16, 24, 32, 48, *range(64, 256, 32), *range(256, most, 64))
    return (*(size for size in steps if size < most), most)


class CaptureError(Exception):
    """A graph does not compute what the step computes that it was made from."""


@dataclass(frozen=True, slots=True)
class Graph:
    """Replays the decode step of this shape over what is staged."""

    shape: StepShape
    replay: Callable[[], None]


class Graphs:
    """sizes: ascending; none: every step is launched kernel by kernel. shared: prefixes of decodes may be, too."""

    def __init__(self, sizes: tuple[int, ...], shared: bool) -> None:
        self._sizes = sizes
        self._keys = [(size, False) for size in sizes]
        if shared:
            self._keys += [(size, True) for size in sizes if size > 1]
        self._graphs: dict[tuple[int, bool], Graph] = {}

    def fitting(self, decodes: int, shared: bool) -> Graph | None:
        """The smallest that holds so many."""
        size = next((size for size in self._sizes if size >= decodes), 0)
        return self._graphs.get((size, shared))

    def clear(self) -> None:
        self._graphs.clear()

    def capture(
        self, platform: Platform, steps: Steps, decoder: Decoder, lanes: Lanes, pool: Pool, limits: Limits, vocab: int
    ) -> None:
        """Captures all sizes, the largest first: the others fit into its memory. Inside the platform's stream.

        Raises CaptureError when a replay differs from the step launched kernel by kernel.
        """
        self.clear()
        platform.begin_captures()
        positions = min(limits.page_size, limits.max_model_len)
        for size, shared in sorted(self._keys, reverse=True):
            shape = steps.graph_shape(size, shared)
            batch = make_batch(decodes_on_page_0(size, positions), limits.page_size)
            launch = partial(decoder.step, steps.device_step(shape), pool)

            def stage(seed: int, shape: StepShape = shape, batch: Batch = batch) -> None:
                lanes.scribble(seed, positions, vocab)
                steps.stage_decodes(batch, shape).passed.record()

            stage(1)
            launch()  # loads modules and picks algorithms, which a capture must not
            replay = platform.capture(launch)
            stage(2)
            launch()
            _check_replay(replay, decoder.logits[:size], decoder.results[0, :size])
            self._graphs[size, shared] = Graph(shape, replay)


def _check_replay(replay: Callable[[], None], logits: torch.Tensor, tokens: torch.Tensor) -> None:
    """logits [size, vocab], tokens [size]: what the kernels have left of the step that is staged."""
    some = logits[:: -(-len(logits) // _COMPARED)]
    wanted = some.float()
    logits.fill_(float("nan"))
    tokens.fill_(-1)
    replay()
    error, largest = float((some.float() - wanted).abs().max()), float(wanted.abs().max())
    if not error <= _TOLERANCE * largest or int(tokens.min()) < 0:
        raise CaptureError(f"the graph of {len(tokens)} decodes differs from its kernels by {error} of {largest}")


def decodes_on_page_0(count: int, positions: int) -> list[Chunk]:
    """One single position each, the first of them written."""
    chunks = []
    for i in range(count):
        at = i % positions
        chunks.append(Chunk(lane_on_page_0(i, 1), at, 1, at + (i >= positions), True))
    return chunks


def lane_on_page_0(slot: int, entries: int) -> Lane:
    """A lane that only the device side of has any meaning."""
    device = Prepared(slot, np.zeros(entries, np.int32))
    return Lane(np.zeros(0, np.uint32), 0, 0, SamplingParams(), None, device)
