"""Runs the kernel tests of tests/kernels/cuda on a GPU: `pytest -p tests.gpu.plugin tests/kernels/cuda/test_norm.py`.

Arrays and tensors lie in managed memory, and the host stand-in's name stands for the GPU. Loaded by name only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests.gpu.device import WaitingGpu
from tests.gpu.managed import install

BUILD: Final = Path(__file__).parents[2] / "build" / "gpu-tests"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--spread", type=int, metavar="N", help="at most N tests of a file, spread over it")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Before any module of the tests is imported, for its constants are arrays too."""
    import torch

    from tests.kernels.cuda import host

    torch.zeros(1, device="cuda")  # makes the primary context, which CuPy and the allocators share
    install(BUILD)
    host.HostDevice = WaitingGpu  # type: ignore[misc,assignment]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if wanted := config.getoption("--spread"):
        files: dict[Path, list[pytest.Item]] = {}
        for item in items:
            files.setdefault(item.path, []).append(item)
        kept = [item for found in files.values() for item in found[:: -(-len(found) // wanted)]]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
