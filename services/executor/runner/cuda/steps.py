"""From a batch to the step's integers on the device: filled, planned, sent."""

from __future__ import annotations

from services.executor.runner.base import Chunk
from services.executor.runner.cuda.attention import Attention
from services.executor.runner.cuda.batch import Batch, make_batch
from services.executor.runner.cuda.limits import Limits
from services.executor.runner.cuda.platform import Platform
from services.executor.runner.cuda.staging import DeviceStep, HostStep, Slot, Staging, StepShape


class Steps:
    """Used inside the platform's stream. history_stride: tokens between two lanes of the history."""

    def __init__(self, platform: Platform, attention: Attention, limits: Limits, history_stride: int) -> None:
        self._attention = attention
        self._page_size = limits.page_size
        self._history_stride = history_stride
        nbytes = attention.largest_shape().nbytes + 4 * limits.max_rows * limits.table_entries
        self._staging = Staging(platform, nbytes, limits.max_rows)

    def graph_shape(self, size: int, shared: bool) -> StepShape:
        """Of a step of up to `size` decodes, always the same. shared: they may share prefixes."""
        return self._attention.graph_shape(size, shared)

    def device_step(self, shape: StepShape) -> DeviceStep:
        """Where a step of this shape lies on the device; all its items are launched."""
        return self._staging.device_step(shape, shape.decode_items, shape.append_items)

    def batch(self, chunks: list[Chunk]) -> Batch:
        attention = self._attention
        return make_batch(chunks, self._page_size, attention.pays if attention.shares_prefixes else None)

    def stage_decodes(self, batch: Batch, shape: StepShape) -> Slot:
        """Stages for the graph of this shape."""
        slot = self._staging.next_slot()
        host = slot.host_step(shape, keep=True)
        host.clear()
        self._attention.plan(batch, host)
        self._send(batch, slot, host, shape)
        return slot

    def stage(self, batch: Batch) -> tuple[Slot, DeviceStep]:
        """Stages for launches kernel by kernel."""
        slot = self._staging.next_slot()
        shape = self._attention.shape_of(batch)
        host = slot.host_step(shape, keep=False)
        counts = self._attention.plan(batch, host)
        self._send(batch, slot, host, shape)
        return slot, self._staging.device_step(shape, counts.decode_items, counts.append_items)

    def _send(self, batch: Batch, slot: Slot, host: HostStep, shape: StepShape) -> None:
        batch.fill(host, self._page_size, self._history_stride)
        self._staging.send(slot, shape, batch.table_entries)
