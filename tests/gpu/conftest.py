"""Without a GPU these tests are skipped as a whole."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest


def has_gpu() -> bool:
    """Asks the driver alone: torch may be a build without CUDA, or missing."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not has_gpu():
        here = Path(__file__).parent
        for item in items:
            if item.path.is_relative_to(here):
                item.add_marker(pytest.mark.skip(reason="no GPU here"))
