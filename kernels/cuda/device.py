"""What a kernel module needs of a device: compile a `.cu` file, launch its kernels on the stream in use.

Addresses are plain integers (`tensor.data_ptr()`, `array.ctypes.data`): nothing here knows torch or CuPy,
so that the same modules drive a GPU and the host stand-in of the tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

SOURCES: Final = Path(__file__).parent

Argument = np.generic  # passed by value: np.uint64 for addresses, np.int32, np.float32, …


class Grid(NamedTuple):
    """Blocks of one launch."""

    x: int
    y: int = 1
    z: int = 1


def address(value: int) -> np.uint64:
    """An address as a kernel's argument; 0 is the null pointer."""
    return np.uint64(value)


class Kernel(ABC):
    """One compiled kernel with its fixed number of threads and bytes of dynamic shared memory."""

    @property
    @abstractmethod
    def blocks_per_multiprocessor(self) -> int:
        """Blocks that are resident at once on one multiprocessor: the occupancy."""

    @abstractmethod
    def launch(self, grid: Grid, arguments: tuple[Argument, ...]) -> None:
        """Enqueues on the stream in use; a grid with a zero does nothing. Allocates nothing: may be captured."""


class Device(ABC):
    """One GPU, or what stands in for it."""

    multiprocessors: int
    compute_capability: int  # 90 for 9.0

    @abstractmethod
    def kernel(
        self, file: str, name: str, defines: Mapping[str, int | str], threads: int, shared_bytes: int = 0
    ) -> Kernel:
        """Compiles `kernels/cuda/FILE` with these macros, once for each set of them, and loads it.

        threads: of a block, in x. shared_bytes: dynamic shared memory; more than 48 KiB is asked for here.
        Raises CompilationError with the compiler's log.
        """


class CompilationError(Exception):
    """A kernel did not compile; the message holds the compiler's log."""
