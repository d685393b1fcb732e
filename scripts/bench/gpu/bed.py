"""A device to measure on: its memory as torch tensors, our kernels, and a clock.

`GpuBed` is the real one. `HostBed` is the tests' stand-in: the same programs run, their times mean nothing.
"""

from __future__ import annotations

import statistics
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch

from kernels.cuda.device import Device

Launch = Callable[[], object]  # enqueues on torch's current stream

_LAUNCHES: Final = 16  # in a graph, at least
_TIMED_SECONDS: Final = 0.1
_REPLAYS: Final = (7, 60)  # at least, at most


class Bed(ABC):
    """Where a benchmark lies."""

    torch_device: torch.device
    kernels: Device
    l2_bytes: int
    real: bool

    @abstractmethod
    def free_bytes(self) -> int:
        """Device memory that nobody has."""

    @abstractmethod
    def synchronize(self) -> None: ...

    @abstractmethod
    def seconds(self, launches: Sequence[Launch], graph: bool = True) -> float:
        """Device time of one launch: the median over replays of a graph that holds all of them in turn.

        launches: the same work on different memory, together larger than the L2 cache.
        graph: False for what cannot be captured; its gaps between launches are then part of the time.
        """

    def scratch(self, nbytes: int) -> torch.Tensor:
        """Zeroed bytes."""
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.torch_device)


class GpuBed(Bed):
    """The first GPU that torch sees."""

    real = True

    def __init__(self) -> None:
        from kernels.cuda.gpu import GpuDevice

        self.torch_device = torch.device("cuda", 0)
        torch.cuda.set_device(0)
        torch.zeros(1, device=self.torch_device)  # makes the primary context, which CuPy then shares
        self.kernels = GpuDevice(0)
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, launches: Sequence[Launch], graph: bool = True) -> float:
        turns = list(launches) * max(1, -(-_LAUNCHES // len(launches)))
        # Loads modules, makes handles, lets allocators grow: none of that may happen during capture.
        for launch in launches:
            launch()
        torch.cuda.synchronize()
        replay = self._captured(turns) if graph else self._eager(turns)
        replay()
        torch.cuda.synchronize()
        times: list[float] = []
        began = time.perf_counter()
        least, most = _REPLAYS
        while len(times) < least or (len(times) < most and time.perf_counter() - began < _TIMED_SECONDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / len(turns))
        return statistics.median(times)

    @staticmethod
    def _eager(turns: Sequence[Launch]) -> Callable[[], None]:
        def run() -> None:
            for launch in turns:
                launch()

        return run

    @staticmethod
    def _captured(turns: Sequence[Launch]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            # Launches that went to another stream leave the graph empty, and its replay very fast.
            warnings.filterwarnings("error", message=".*[Gg]raph is empty.*")
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for launch in turns:
                    launch()
        return graph.replay


class HostBed(Bed):
    """CPU tensors, and kernels through the shim of the tests."""

    real = False
    l2_bytes = 1 << 16

    def __init__(self, folder: Path) -> None:
        from tests.kernels.cuda.host import HostDevice

        self.torch_device = torch.device("cpu")
        self.kernels = HostDevice(folder)

    def free_bytes(self) -> int:
        return 64 << 20

    def synchronize(self) -> None:
        pass

    def seconds(self, launches: Sequence[Launch], graph: bool = True) -> float:
        began = time.perf_counter()
        for launch in launches:
            launch()
        return (time.perf_counter() - began) / len(launches)
