"""Instruction sets: they agree, they can be forced, and none leaks into code that every processor runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from kernels.cpu import native
from kernels.cpu.native import ModelShape, NativeError, available_isas
from pagehold.runtime.settings import ExecutorSettings
from tests.kernels.test_bit_exact import LENGTH, sequence
from tests.kernels.variants import GROUPED, WINDOWED, Pages, Variant, as_chunks, random_tensors

KNOWN = ("portable", "avx2", "avx512bf16", "amx")
BASE = ("draft", "engine", "library", "matrix", "plan", "processor", "sampling", "threads")  # run by every processor


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "tolerance"),
    [("float32", "float32", 1e-5), ("bfloat16", "bfloat16", 0.03), ("bfloat16", "int8", 0.03)],
)
@pytest.mark.parametrize("shape", [GROUPED, WINDOWED], ids=["grouped", "windowed"])
def test_instruction_sets_agree(
    variants: list[Variant], shape: ModelShape, dtype: str, kv_dtype: str, tolerance: float
) -> None:
    tensors = random_tensors(shape)
    results = []
    for variant in variants:
        model = variant.model(shape, tensors, dtype, kv_dtype=kv_dtype)
        pages = Pages(model, shape, kv_dtype, 50, 16)
        lane = sequence(pages)
        results.append(model.logits(as_chunks([lane.chunk(0, LENGTH)])))
        model.close()
    assert len(results) >= 3
    for other in results[1:]:
        error = np.abs(other - results[0])
        assert float(np.sqrt(np.mean(error**2))) < tolerance * float(results[0].std())


def test_the_best_one_is_the_default_and_any_can_be_forced() -> None:
    names = available_isas()
    assert names[0] == "portable" and set(names) <= set(KNOWN)
    for isa in (None, *names):
        model = Variant(isa or "", None).sampler(4)
        assert model.isa == (isa or names[-1])
        model.close()


@pytest.mark.parametrize("isa", ["avx9000", "AVX2", *(isa for isa in KNOWN if isa not in available_isas())])
def test_one_clear_error_for_what_the_machine_lacks(isa: str) -> None:
    with pytest.raises(NativeError) as raised:
        Variant(isa, None).sampler(4)
    message = str(raised.value)
    assert "\n" not in message and f"asked for {isa}" in message and ", ".join(available_isas()) in message


def test_settings_name_them_as_the_library_does(monkeypatch: pytest.MonkeyPatch) -> None:
    field = ExecutorSettings.model_fields["cpu_isa"]
    names = {name for part in get_args(field.annotation) for name in get_args(part)}
    assert names == set(KNOWN)
    monkeypatch.setenv("PAGEHOLD_CPU_ISA", "portable")
    assert ExecutorSettings().cpu_isa == "portable"
    monkeypatch.setenv("PAGEHOLD_CPU_ISA", "avx9000")
    with pytest.raises(ValueError, match="portable"):
        ExecutorSettings()


@pytest.fixture(scope="module")
def objects(emulated_build: Path) -> dict[str, Path]:
    """The object files by their source's name."""
    found = {path.name.removesuffix(".cpp.o"): path for path in emulated_build.rglob("*.cpp.o")}
    assert {*(f"isa_{isa}" for isa in KNOWN), *BASE} <= set(found)
    return found


@pytest.mark.parametrize("isa", KNOWN)
def test_only_the_table_is_external(objects: dict[str, Path], isa: str) -> None:
    """A weak symbol, such as an inline function of a header, would be folded with the one of another file."""
    listed = subprocess.run(
        ["nm", "-C", "--defined-only", "--extern-only", objects[f"isa_{isa}"]],
        check=True,
        capture_output=True,
        text=True,
    )
    symbols = [line.split(maxsplit=2)[1:] for line in listed.stdout.splitlines()]
    assert symbols == [["T", f"{isa}_table(bool)"]]


def test_nothing_runs_when_the_library_is_loaded(objects: dict[str, Path]) -> None:
    """A constructor of a wide file would run on every processor."""
    for isa in KNOWN:
        listed = subprocess.run(["objdump", "-h", objects[f"isa_{isa}"]], check=True, capture_output=True, text=True)
        assert ".text" in listed.stdout and ".init_array" not in listed.stdout, isa


def test_what_every_processor_runs_has_no_wide_registers(objects: dict[str, Path]) -> None:
    for name in ("isa_portable", *BASE):
        code = subprocess.run(["objdump", "-d", objects[name]], check=True, capture_output=True, text=True).stdout
        assert "%xmm" in code or name in ("processor", "threads")
        assert not re.search(r"%[yz]mm", code), name


def test_the_library_exports_its_interface_alone() -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", Path(native.__file__).parent / "libpagehold_cpu.so"],
        check=True,
        capture_output=True,
        text=True,
    )
    names = {line.split()[-1] for line in listed.stdout.splitlines() if " T " in line}
    assert names and all(name.startswith("pagehold_") for name in names)
