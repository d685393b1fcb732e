"""The integers of a step: filled into pinned memory by the host, copied to the device at once.

    | token_index | kv_slots | positions | queries | samples | sample_rows | decode | append | tables ...
    |<---------------- fixed by the step's shape, padding marked invalid ----------------->|<- as long
                                                                                             as needed

A graph has the device addresses of its shape built in, so each shape lies the same way in every step. The block
tables come last and packed: only what the step reads of them travels, however long a sequence may become.

There are two pinned buffers and one on the device. Copies and kernels go down one stream, so the device's is read
before it is overwritten; a pinned one is filled again only when the step that it was copied for has passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from services.executor.runner.cuda.platform import Platform

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_ALIGNMENT: Final = 16  # bytes, of each array


class StepShape(NamedTuple):
    """The capacities of a step."""

    tokens: int
    rows: int  # that may be sampled
    decode_items: int  # work items of the decode kernel
    append_items: int

    @property
    def nbytes(self) -> int:
        """Without the block tables."""
        return sum(_padded(nbytes) for _, _, nbytes in self._arrays())

    def _arrays(self) -> list[tuple[tuple[int, ...], torch.dtype, int]]:
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((self.tokens,), torch.int64),
            ((self.tokens,), torch.int64),
            ((self.tokens,), torch.int32),
            ((self.tokens, 4), torch.int32),
            ((self.rows, 4), torch.int32),
            ((self.rows,), torch.int64),
            ((self.decode_items, 8), torch.int32),
            ((self.append_items, 8), torch.int32),
        ]
        return [(shape, dtype, int(np.prod(shape)) * dtype.itemsize) for shape, dtype in shapes]

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The arrays in `buffer` (uint8), the block tables last."""
        found, offset = [], 0
        for shape, dtype, nbytes in self._arrays():
            found.append(buffer[offset : offset + nbytes].view(dtype).view(shape))
            offset += _padded(nbytes)
        return [*found, buffer[offset:].view(torch.int32)]


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class HostStep:
    """Where the host writes. Slots are positions in the pool: page x page_size + offset."""

    token_index: I64  # [tokens] of each token in the flat history
    kv_slots: I64  # [tokens]; -1: K and V are not written
    positions: I32  # [tokens]
    queries: I32  # [tokens, 4], see `attention_plan`
    samples: I32  # [rows, 4] lane slot, position of the new token, valid, 0
    sample_rows: I64  # [rows] the token whose hidden state is sampled from
    decode_items: I32  # [items, 8], see `attention_plan`
    append_items: I32
    tables: I32  # page ids of all sequences, one after another

    def clear(self) -> None:
        """Everything invalid: the padding of a graph."""
        for array in (self.token_index, self.positions, self.queries, self.samples, self.sample_rows):
            array[...] = 0
        self.kv_slots[...] = -1
        self.decode_items[...] = 0
        self.append_items[...] = 0


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """The same on the device, where the kernels read."""

    tokens: int
    rows: int
    decode_count: int  # items that are launched
    append_count: int
    token_index: torch.Tensor
    kv_slots: torch.Tensor
    positions: torch.Tensor
    queries: torch.Tensor
    samples: torch.Tensor
    sample_rows: torch.Tensor
    decode_items: torch.Tensor
    append_items: torch.Tensor
    tables: torch.Tensor


class Slot:
    """One step's place on the host, from the filling of its integers to the reading of its results."""

    def __init__(self, platform: Platform, nbytes: int, rows: int) -> None:
        self._staged = platform.pinned(nbytes)
        self.results = platform.pinned(2 * 4 * rows).view(torch.int32).view(2, rows)
        self.passed = platform.event()
        self._steps: dict[StepShape, HostStep] = {}

    def host_step(self, shape: StepShape, keep: bool) -> HostStep:
        """keep: the shape comes again; its views are kept."""
        step = self._steps.get(shape)
        if step is None:
            step = HostStep(*(view.numpy() for view in shape.views(self._staged)))
            if keep:
                self._steps[shape] = step
        return step

    def copy(self, target: torch.Tensor, nbytes: int) -> None:
        target[:nbytes].copy_(self._staged[:nbytes], non_blocking=True)


class Staging:
    """nbytes: of the largest step, tables included. rows: the most that are sampled in a step."""

    def __init__(self, platform: Platform, nbytes: int, rows: int) -> None:
        self._slots = [Slot(platform, _padded(nbytes), rows) for _ in range(2)]
        self._device = torch.zeros(_padded(nbytes), dtype=torch.uint8, device=platform.torch_device)
        self._turn = 0

    def next_slot(self) -> Slot:
        """Blocks until the step before the last has passed."""
        self._turn ^= 1
        slot = self._slots[self._turn]
        slot.passed.wait()
        return slot

    def send(self, slot: Slot, shape: StepShape, table_entries: int) -> None:
        """Enqueues the copy."""
        slot.copy(self._device, shape.nbytes + 4 * table_entries)

    def device_step(self, shape: StepShape, decode_count: int, append_count: int) -> DeviceStep:
        return DeviceStep(shape.tokens, shape.rows, decode_count, append_count, *shape.views(self._device))
