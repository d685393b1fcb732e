"""What the runner asks of the machine beside kernels: streams, events, pinned memory, graphs.

Everything else is plain torch on `torch_device`, so that the same runner works on CPU tensors in tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from kernels.cuda.device import Device


class Memory(NamedTuple):
    """Of the device, whoever uses it; bytes."""

    free: int
    total: int


class Event(ABC):
    """A mark in the stream; may be recorded again once it has passed."""

    @abstractmethod
    def record(self) -> None:
        """Marks what the stream in use holds now."""

    @abstractmethod
    def wait(self) -> None:
        """Blocks this thread until the mark has passed; returns at once if it was never recorded."""


class Platform(ABC):
    """One device with one stream of work. Every method may be called from any one thread at a time."""

    device: Device
    torch_device: torch.device
    most_graph_decodes: int = 512  # beyond, launches are hidden behind the work
    bandwidth: float  # bytes/s of the device's memory, as its data sheet has it

    @abstractmethod
    def stream(self) -> AbstractContextManager[object]:
        """Inside, torch and our kernels enqueue on the runner's stream."""

    @abstractmethod
    def event(self) -> Event: ...

    @abstractmethod
    def pinned(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] on the host that the device copies from and to without waiting."""

    @abstractmethod
    def begin_captures(self) -> None:
        """What is captured from now on shares its memory; what was captured before has been dropped."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records what `work` enqueues; calling the result enqueues it again.

        `work` has run once before, allocates nothing of its own, and its tensors outlive the result. Called
        inside `stream()`.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Blocks until the stream is empty. Raises what a kernel died of."""

    @abstractmethod
    def memory(self) -> Memory:
        """After giving back what no tensor uses."""
