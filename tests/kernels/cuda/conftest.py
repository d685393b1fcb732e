"""Host devices that share one cache of compiled kernels."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.kernels.cuda.host import HostDevice

CACHE = Path(__file__).parents[3] / "build" / "host-kernels"


@pytest.fixture(scope="session")
def host_cache() -> Path:
    """Kept between runs, for files are named by the content of their sources; what is a week old goes."""
    oldest = time.time() - 7 * 86_400
    for file in CACHE.glob("*") if CACHE.exists() else ():
        with suppress(FileNotFoundError):  # another worker compiles, or clears up as well
            if file.stat().st_mtime < oldest:
                file.unlink()
    return CACHE


@pytest.fixture(scope="session")
def host(host_cache: Path) -> HostDevice:
    """Threads and blocks in ascending order."""
    return HostDevice(host_cache)


@pytest.fixture(params=["forward", "reverse", "random:1"])
def scheduled_host(request: pytest.FixtureRequest, host_cache: Path) -> HostDevice:
    """The same under every kind of schedule."""
    return HostDevice(host_cache, schedule=request.param)
