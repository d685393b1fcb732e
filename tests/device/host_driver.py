"""A GPU's stand-in for whole processes: CPU tensors, kernels through the shim, graphs that call their work again.

Everything has been done when a call returns, so events never wait.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from services.executor.runner.cuda.platform import Event, Memory, Platform
from tests.kernels.cuda.host import HostDevice

_CACHE = Path(__file__).parents[2] / "build" / "host-kernels"  # the kernel tests' own
_TOTAL = 1 << 28  # bytes that the device claims to have


class _Passed(Event):
    def record(self) -> None: ...

    def wait(self) -> None: ...


class HostPlatform(Platform):
    most_graph_decodes = 4  # each costs three steps at the start

    def __init__(self, device: HostDevice) -> None:
        self.device = device
        self.torch_device = torch.device("cpu")
        self.bandwidth = 1e9
        self.captures = 0

    def stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def event(self) -> Event:
        return _Passed()

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def begin_captures(self) -> None: ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        return work

    def synchronize(self) -> None: ...

    def memory(self) -> Memory:
        return Memory(_TOTAL // 2, _TOTAL)


def make_device() -> HostDevice:
    """Kernels are compiled once into a folder that all processes share."""
    return HostDevice(_CACHE)


def make_platform() -> HostPlatform:
    """For a process of its own: torch's threads would fight those of the other processes."""
    torch.set_num_threads(1)
    return HostPlatform(make_device())
