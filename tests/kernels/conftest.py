"""Every instruction set of this machine; of AVX-512 and AMX those that it lacks, compiled to run without them."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from kernels.cpu.native import available_isas
from tests.kernels.variants import SOURCE, Variant

EMULATED = ("avx512bf16", "amx")


@pytest.fixture(scope="session")
def emulated_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder of the library with PAGEHOLD_EMULATE; the library itself lies in it. Workers share it: the
    others find nothing left to build.
    """
    folder = tmp_path_factory.getbasetemp()
    build = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "emulated"
    build.mkdir(exist_ok=True)
    options = ("-DPAGEHOLD_EMULATE=ON", f"-DPAGEHOLD_OUTPUT_DIR={build}")
    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["cmake", "-S", SOURCE, "-B", build, *options], check=True, capture_output=True)
        subprocess.run(["cmake", "--build", build, "--parallel", "2"], check=True, capture_output=True)
    return build


def _emulated(isa: str, build: Path) -> Variant:
    return Variant(isa, build / "libpagehold_cpu.so")


_LACKING = [isa for isa in EMULATED if isa not in available_isas()]


@pytest.fixture(scope="session", params=[*available_isas(), *(f"{isa}-emulated" for isa in _LACKING)])
def variant(request: pytest.FixtureRequest) -> Variant:
    isa, emulated, _ = request.param.partition("-emulated")
    return _emulated(isa, request.getfixturevalue("emulated_build")) if emulated else Variant(isa, None)


@pytest.fixture(scope="session")
def variants(emulated_build: Path) -> list[Variant]:
    """All of the machine's and all emulated ones, which must agree."""
    machine = [Variant(isa, None) for isa in available_isas()]
    return [*machine, *(_emulated(isa, emulated_build) for isa in EMULATED)]
