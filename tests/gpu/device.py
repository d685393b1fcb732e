"""The GPU as the device of kernel tests, which read and write arrays right after a launch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from kernels.cuda.device import Argument, Device, Grid, Kernel


class Waiting(Kernel):
    """Waits for each launch: tests look at their arrays at once, as they may on the host stand-in."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    @property
    def blocks_per_multiprocessor(self) -> int:
        return self._kernel.blocks_per_multiprocessor

    def launch(self, grid: Grid, arguments: tuple[Argument, ...]) -> None:
        import torch

        self._kernel.launch(grid, arguments)
        torch.cuda.synchronize()


@cache
def _gpu() -> Device:
    """One for all tests: it keeps what it has compiled."""
    from kernels.cuda.gpu import GpuDevice

    return GpuDevice(0)


class WaitingGpu(Device):
    """Takes the host stand-in's options and needs none of them."""

    def __init__(self, *options: object, **more: object) -> None:
        self._device = _gpu()
        self.multiprocessors = self._device.multiprocessors
        self.compute_capability = self._device.compute_capability

    def kernel(
        self, file: str, name: str, defines: Mapping[str, int | str], threads: int, shared_bytes: int = 0
    ) -> Kernel:
        return Waiting(self._device.kernel(file, name, defines, threads, shared_bytes))
