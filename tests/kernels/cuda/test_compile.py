"""Every kernel compiles for every architecture, without a GPU, and is what a fast kernel must be: see each test.

The compiler is NVRTC with the options that CuPy gives it. What is compiled is what the kernel modules ask for.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import pytest

from kernels.cuda.device import SOURCES, CompilationError
from kernels.cuda.gpu import compile_options
from tests.kernels.cuda.builds import APPEND, ARCHITECTURES, DECODE, OTHERS, Build, recorded
from tests.kernels.cuda.nvrtc import Usage, compile_cubin, instructions, usage

FILES: Final = sorted(str(file.relative_to(SOURCES)) for file in SOURCES.rglob("*.cu"))
ASKED: Final = frozenset(build.file for build in recorded((*DECODE, *APPEND, *OTHERS), 90))
REGISTERS: Final = 65_536  # of a multiprocessor
SHARED_KIB: Final = {80: 164, 90: 228, 100: 228}  # of a multiprocessor; a block takes 1 KiB more than it asks for


def options(arch: int, defines: Sequence[tuple[str, int | str]] = ()) -> tuple[str, ...]:
    return (*compile_options(dict(defines)), "-ftz=true", f"-arch=sm_{arch}")


@pytest.fixture(scope="module")
def compilers() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield pool


def compiled(compilers: ProcessPoolExecutor, builds: Sequence[Build]) -> dict[Build, Path]:
    files = [build.file for build in builds]
    return dict(
        zip(
            builds,
            compilers.map(compile_cubin, files, [options(build.arch, build.defines) for build in builds]),
            strict=True,
        )
    )


def check_fits(build: Build, used: Usage) -> None:
    """Can be launched as asked for, and MIN_BLOCKS of it are resident at once."""
    resident = int(dict(build.defines).get("MIN_BLOCKS", 1))
    warps = -(-build.threads // 32)
    registers = -(-used.registers * 32 // 256) * 256 * warps
    shared = used.shared + build.shared_bytes + (0 if build.arch >= 90 else 1024)  # counted by the compiler since sm_90
    assert registers * resident <= REGISTERS, f"{build}: {used}"
    assert shared * resident <= SHARED_KIB[build.arch] * 1024, f"{build}: {used}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_file_compiles_alone(compilers: ProcessPoolExecutor, arch: int) -> None:
    """With the defaults of all its macros."""
    files = [file for file in FILES if arch != 90 or file not in ASKED]  # the tests below compile these for sm_90
    cubins = list(compilers.map(compile_cubin, files, [options(arch)] * len(files)))
    for file, cubin in zip(files, cubins, strict=True):
        kernels = usage(cubin)
        assert kernels, file
        if "decode" in file:
            assert all(used.stack == used.local == 0 for used in kernels.values()), f"{file}: {kernels}"


def test_decode_keeps_everything_in_registers(compilers: ProcessPoolExecutor) -> None:
    """Tensor cores, asynchronous copies, no spill and no stack: for all head sizes, and the other options."""
    builds = [
        *recorded(DECODE, 90),
        *(build for arch in (80, 100) for build in recorded(DECODE[3:4] + DECODE[7:8], arch)),
    ]
    for build, cubin in compiled(compilers, builds).items():
        used = usage(cubin)[build.name]
        assert used.stack == used.local == 0, f"{build}: {used}"
        check_fits(build, used)
        found = instructions(cubin)[build.name]
        check_pipeline(build, found)
        assert not {name for name in found if name.split(".")[0] in ("LDL", "STL")}, build


def test_append_runs_on_tensor_cores(compilers: ProcessPoolExecutor) -> None:
    builds = [*recorded(APPEND, 90), *(build for arch in (80, 100) for build in recorded(APPEND[3:4], arch))]
    for build, cubin in compiled(compilers, builds).items():
        check_fits(build, usage(cubin)[build.name])
        check_pipeline(build, instructions(cubin)[build.name])


def check_pipeline(build: Build, found: frozenset[str]) -> None:
    for wanted in ("HMMA.16816.F32", "LDGSTS.E.BYPASS", "LDSM.16"):
        assert any(name.startswith(wanted) for name in found), f"{build} has no {wanted}"


def test_the_other_kernels_fit(compilers: ProcessPoolExecutor) -> None:
    for build, cubin in compiled(compilers, recorded(OTHERS, 90)).items():
        used = usage(cubin)[build.name]
        assert used.stack == used.local == 0, f"{build}: {used}"
        check_fits(build, used)
        if build.file == "gemm.cu":
            check_pipeline(build, instructions(cubin)[build.name])


def test_only_rungs_of_the_ladder_are_asked_for_by_no_module() -> None:
    assert {file for file in FILES if not file.startswith("ladder/")} == ASKED


def test_the_log_is_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(CompilationError, match="UNKNOWN_TYPE"):
        compile_cubin("activation.cu", options(90, [("DTYPE", "UNKNOWN_TYPE")]))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: NVRTC has compiled the same file")
def test_nvcc_compiles_the_same_file(tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", f"-I{SOURCES}", "-arch=sm_90", "-cubin", "-o", tmp_path / "decode.cubin"]
    subprocess.run([*command, SOURCES / "paged_decode.cu"], check=True, capture_output=True)
    assert "paged_decode" in usage(tmp_path / "decode.cubin")
