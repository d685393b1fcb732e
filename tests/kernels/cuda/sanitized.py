"""Runs checks by name with the sanitizers: `python -m tests.kernels.cuda.sanitized CACHE decode gemm …`.

The process must have been started with libasan loaded. "out_of_bounds" is a kernel that writes past an array.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from kernels.cuda.device import Grid, address
from tests.kernels.cuda.host import SHIM, HostDevice


def main(cache: Path, names: list[str]) -> None:
    device = HostDevice(cache, sanitize=True, schedule="random:5")
    for name in names:
        if name == "out_of_bounds":
            out_of_bounds(cache)
        else:
            from tests.kernels.cuda.checks import CHECKS

            next(check for check in CHECKS if check.__name__ == name)(device)
        print(f"passed: {name}", flush=True)


def out_of_bounds(cache: Path) -> None:
    words = np.zeros(32, np.uint32)
    kernel = HostDevice(cache, sanitize=True, sources=SHIM).kernel("probes.cu", "out_of_bounds", {}, 32)
    kernel.launch(Grid(1), (address(words.ctypes.data), np.int32(1)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
