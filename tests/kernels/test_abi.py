"""A library and a Python package that do not belong together refuse each other."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kernels.cpu import native
from kernels.cpu.native import NativeError
from tests.kernels.variants import Variant

PORTABLE = Variant("portable", None)


def refused() -> None:
    with pytest.raises(NativeError, match="another version"):
        PORTABLE.sampler(4)


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    PORTABLE.sampler(4).close()
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    refused()


@pytest.mark.parametrize("name", ["_Model", "_Sampling"])
def test_another_size_of_a_struct(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    grown = type(name, (getattr(native, name),), {"_fields_": [("more", ctypes.c_uint64)]})
    monkeypatch.setattr(native, name, grown)
    refused()


def test_another_size_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [(name, native.CHUNK[name]) for name in native.CHUNK.names or ()]
    monkeypatch.setattr(native, "CHUNK", np.dtype([*fields, ("more", np.uint64)]))
    refused()


def test_a_library_without_one_of_the_functions(tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    source.write_text('const char* pagehold_isas(void) { return "portable"; }\n')
    library = tmp_path / "libpagehold_cpu.so"
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    with pytest.raises(NativeError, match="another version"):
        Variant("portable", library).sampler(4)


def test_a_missing_library_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(NativeError, match="cannot be loaded"):
        Variant("portable", tmp_path / "libpagehold_cpu.so").sampler(4)
