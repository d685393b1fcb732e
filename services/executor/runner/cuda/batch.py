"""A step's chunks as arrays: one span of tokens for each chunk.

    tokens   0 ..................................................... T
             | span 0      | span 1 | span 2 | span 3                 |

Decodes that begin with the same pages stand together, so that one work item can read those for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kernels.cuda.attention_plan import SharedPrefix
from services.executor.runner.base import Chunk
from services.executor.runner.cuda.lanes import Prepared
from services.executor.runner.cuda.staging import HostStep

I64 = npt.NDArray[np.int64]
Pages = list[npt.NDArray[np.int32]]  # block tables, of one sequence each


@dataclass(slots=True)
class Batch:
    """All arrays are [spans]."""

    order: I64  # the chunk behind each span
    lanes: I64  # slots
    starts: I64
    counts: I64
    write_from: I64
    samples: npt.NDArray[np.bool_]
    pages: Pages
    firsts: I64  # first token of each span
    table_firsts: I64  # first entry of each span's block table in the packed tables
    table_lengths: I64
    prefixes: list[SharedPrefix] = field(default_factory=list)  # of spans

    @property
    def spans(self) -> int:
        return len(self.order)

    @property
    def tokens(self) -> int:
        return int(self.firsts[-1] + self.counts[-1])

    @property
    def is_decode(self) -> bool:
        """Single positions only."""
        return self.tokens == self.spans

    @property
    def table_entries(self) -> int:
        return int(self.table_firsts[-1] + self.table_lengths[-1])

    def fill(self, step: HostStep, page_size: int, history_stride: int) -> None:
        """Writes everything but the attention's plan. The step's padding is cleared before."""
        tables = step.tables
        for pages, first, length in zip(
            self.pages, self.table_firsts.tolist(), self.table_lengths.tolist(), strict=True
        ):
            tables[first : first + length] = pages[:length]
        spans, tokens = self.spans, self.tokens
        of = slice(None) if self.is_decode else np.repeat(np.arange(spans), self.counts)  # the span of each token
        positions = np.arange(tokens) + (self.starts - self.firsts)[of]
        step.positions[:tokens] = positions
        step.token_index[:tokens] = self.lanes[of] * history_stride + positions
        pages_of = tables[self.table_firsts[of] + positions // page_size].astype(np.int64)
        written = positions >= self.write_from[of]
        step.kv_slots[:tokens] = np.where(written, pages_of * page_size + positions % page_size, -1)
        samples = step.samples[:spans]
        samples[:, 0], samples[:, 1], samples[:, 2] = self.lanes, self.starts + self.counts, self.samples
        samples[:, 3] = 0
        step.sample_rows[:spans] = self.firsts + self.counts - 1


def make_batch(chunks: list[Chunk], page_size: int, pays: Callable[[SharedPrefix], bool] | None = None) -> Batch:
    """Every lane of the chunks is prepared. pays: whether a prefix is worth sharing; None: none is."""
    lanes, starts, counts, write_from, samples, _ = zip(*chunks, strict=True)
    devices: list[Prepared] = [lane.device for lane in lanes]
    order = np.arange(len(chunks))
    numbers = np.array((starts, counts, write_from, samples, [device.slot for device in devices]), np.int64)
    pages = [device.pages for device in devices]
    prefixes: list[SharedPrefix] = []
    if pays is not None and len(chunks) > 1 and max(counts) == 1:
        order, prefixes = _shared(pages, numbers[0], page_size, pays)
        numbers, pages = numbers[:, order], [pages[i] for i in order.tolist()]
    start, count = numbers[0], numbers[1]
    lengths = -(-(start + count) // page_size)
    return Batch(
        order=order,
        lanes=numbers[4],
        starts=start,
        counts=count,
        write_from=numbers[2],
        samples=numbers[3] != 0,
        pages=pages,
        firsts=np.cumsum(count) - count,
        table_firsts=np.cumsum(lengths) - lengths,
        table_lengths=lengths,
        prefixes=prefixes,
    )


def _shared(
    pages: Pages, positions: I64, page_size: int, pays: Callable[[SharedPrefix], bool]
) -> tuple[I64, list[SharedPrefix]]:
    """An order of the decodes in which those with the same first page are adjacent, and what they share.

    A prefix ends before the position of every decode that has it, so each has a key of its own.
    """
    _, group, members = np.unique(np.array([row[0] for row in pages]), return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(members)
    prefixes = []
    for i in np.flatnonzero(members > 1).tolist():
        end, first = int(ends[i]), int(ends[i] - members[i])
        most = int(positions[order[first:end]].min()) // page_size
        if not pays(SharedPrefix(first, end, most * page_size)):
            continue  # not even if they share all of it
        tables = np.stack([pages[j][:most] for j in order[first:end].tolist()])
        different = np.flatnonzero((tables != tables[0]).any(axis=0))
        prefix = SharedPrefix(first, end, (int(different[0]) if len(different) else most) * page_size)
        if pays(prefix):
            prefixes.append(prefix)
    return order, prefixes
