"""The platform on a real GPU: one torch stream, CUDA graphs in a pool of their own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from kernels.cuda.gpu import GpuDevice
from services.executor.runner.cuda.platform import Event, Memory, Platform


class _GpuEvent(Event):
    def __init__(self) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self) -> None:
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()


class GpuPlatform(Platform):
    """ordinal: among the visible devices."""

    def __init__(self, ordinal: int = 0) -> None:
        self.torch_device = torch.device("cuda", ordinal)
        torch.cuda.set_device(self.torch_device)
        self.device = GpuDevice(ordinal)
        properties = torch.cuda.get_device_properties(ordinal)
        # kHz and bits; two transfers a cycle.
        self.bandwidth = 2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8
        # A stream of our own: work on the null stream would wait for, and hold up, everything else.
        self._stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._graph_pool = torch.cuda.graph_pool_handle()

    def stream(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return context

    def event(self) -> Event:
        return _GpuEvent()

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def begin_captures(self) -> None:
        # Torch does not take a pool again whose last graph is gone.
        self._graph_pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Thread-local: what other threads do meanwhile (the importer of the pool, say) is not our capture's business.
        with torch.cuda.graph(graph, pool=self._graph_pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    def synchronize(self) -> None:
        self._stream.synchronize()

    def memory(self) -> Memory:
        torch.cuda.empty_cache()
        return Memory(*torch.cuda.mem_get_info(self.torch_device))
