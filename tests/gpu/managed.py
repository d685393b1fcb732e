"""NumPy arrays and torch's CPU tensors in memory that a GPU reads and writes too.

Tests of kernels hand over addresses of arrays and tensors. `install` puts new ones into CUDA's managed memory, which
has the same address on both sides, so that the very same tests run on the host stand-in and on a GPU. Each is an
allocation of its own: compute-sanitizer sees where it ends.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any, Final

SOURCE: Final = Path(__file__).with_name("managed.cpp")
DRIVER: Final = "libcuda.so.1"

_SET_HANDLER: Final = 304  # PyDataMem_SetHandler in NumPy's table of C functions
_VERSION: Final = 1
_FAILURES: Final = ("", "there is no such library", "it lacks functions", "it gives no context")


class _Handler(ctypes.Structure):
    """`PyDataMem_Handler`."""

    _fields_ = [
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("context", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("malloc", "calloc", "realloc", "free")),
    ]


def build(folder: Path) -> Path:
    """Compiles the allocators against this torch. Raises CalledProcessError."""
    import torch

    library = folder / f"managed-{torch.__version__}-{SOURCE.stat().st_mtime_ns}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        root = Path(torch.__file__).parent
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", abi]
        links = [f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-lc10", "-ldl"]
        command = ["g++", *flags, f"-I{root}/include", "-o", str(library), str(SOURCE), *links]
        subprocess.run(command, check=True)
    return library


def install(folder: Path, driver: str = DRIVER) -> ctypes.CDLL:
    """All arrays and tensors of this thread are made in managed memory from now on; others' stay where they are.

    folder: for what is compiled. Raises OSError when the driver cannot be used.
    """
    library = ctypes.CDLL(str(build(folder)))
    if code := library.install(driver.encode()):
        raise OSError(f"{driver}: {_FAILURES[code]}")
    functions = [ctypes.cast(getattr(library, f"numpy_{name}"), ctypes.c_void_p) for name, _ in _Handler._fields_[3:]]
    handler = _Handler(b"managed", _VERSION, None, *functions)
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    capsule = make(ctypes.addressof(handler), b"mem_handler", None)
    for kept in (handler, capsule):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))  # arrays outlive modules: what frees them must too
    _numpy_function(_SET_HANDLER, ctypes.py_object, ctypes.py_object)(capsule)
    return library


def _numpy_function(index: int, *types: Any) -> Any:
    import numpy as np

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    table = pointer(np._core._multiarray_umath._ARRAY_API, None)
    address = ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))[index]
    return ctypes.PYFUNCTYPE(*types)(address)
