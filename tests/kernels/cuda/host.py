"""A device made of the CPU: the same `.cu` files compiled by g++, one fiber for each CUDA thread.

A launch runs at once and returns when it has ended. What the shim's engine shows about a kernel is said in
`shim/engine.h`: under one of the schedules a missing barrier or wait gives a wrong result, and lanes that
diverge, threads that wait for ever and writes past the dynamic shared memory are reported as LaunchError.
What it cannot show: a missing fence, or warp barrier before a collective, for all see memory at once; bank
conflicts; speed.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from kernels.cuda.device import SOURCES, Argument, CompilationError, Device, Grid, Kernel

SHIM: Final = Path(__file__).parent / "shim"
FLAGS: Final = (
    *("-std=c++17", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing"),
    *("-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-DPAGEHOLD_HOST", f"-I{SHIM}"),
)
SANITIZERS: Final = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# What entry.h says of a parameter, and the scalars that may be given for it.
CODES: Final[Mapping[str, tuple[type[np.generic], ...]]] = {
    "p": (np.uint64,),
    "l": (np.uint64, np.int64),
    "i": (np.int32, np.uint32),
    "f": (np.float32,),
    "d": (np.float64,),
}
SCHEDULES: Final = ("forward", "reverse", "random:1")


class LaunchError(Exception):
    """A kernel did what would be undefined, or for ever, on a GPU."""


class HostKernel(Kernel):
    """One kernel of a library that g++ made."""

    def __init__(self, device: HostDevice, library: ctypes.CDLL, name: str, threads: int, shared_bytes: int) -> None:
        self._device = device
        self._name = name
        self._threads = threads
        self._shared_bytes = shared_bytes
        describe = getattr(library, f"parameters_of_{name}")
        describe.restype = ctypes.c_char_p
        self._codes: str = describe().decode()
        self._launch = getattr(library, f"launch_{name}")

    @property
    def blocks_per_multiprocessor(self) -> int:
        return 2

    def launch(self, grid: Grid, arguments: tuple[Argument, ...]) -> None:
        """Runs the grid. Raises TypeError for arguments that are not the kernel's, LaunchError."""
        given = tuple(type(argument) for argument in arguments)
        if len(given) != len(self._codes) or any(
            kind not in CODES[code] for kind, code in zip(given, self._codes, strict=True)
        ):
            raise TypeError(f"{self._name} takes {self._codes!r}, not {[kind.__name__ for kind in given]}")
        if 0 in grid:
            return
        values = [np.asarray(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        schedule, _, seed = self._device.schedule.partition(":")
        launch = _Launch(
            (ctypes.c_int * 3)(*grid),
            self._threads,
            self._shared_bytes,
            ("forward", "reverse", "random").index(schedule),
            int(seed or 0),
        )
        message = ctypes.create_string_buffer(1024)
        if self._launch(ctypes.byref(launch), pointers, message, len(message)):
            raise LaunchError(message.value.decode())


class HostDevice(Device):
    """The CPU as a device.

    cache: folder of what g++ made, named by the content of all sources, so that it may be shared and kept.
    schedule: "forward", "reverse" or "random:SEED" order of threads and blocks; may be changed between launches.
    sanitize: with the address and undefined-behaviour sanitizers; the process must have loaded libasan first.
    sources: the folder of the `.cu` files.
    """

    def __init__(
        self,
        cache: Path,
        *,
        schedule: str = "forward",
        sanitize: bool = False,
        sources: Path = SOURCES,
        multiprocessors: int = 4,
        compute_capability: int = 90,
    ) -> None:
        self.schedule = schedule
        self.multiprocessors = multiprocessors
        self.compute_capability = compute_capability
        self._cache = cache
        self._sources = sources
        self._flags = (*FLAGS, f"-I{sources}", f"-I{SOURCES}", *(SANITIZERS if sanitize else ("-O2",)))
        self._libraries: dict[tuple[str, ...], ctypes.CDLL] = {}
        cache.mkdir(parents=True, exist_ok=True)

    def kernel(
        self, file: str, name: str, defines: Mapping[str, int | str], threads: int, shared_bytes: int = 0
    ) -> HostKernel:
        if not 1 <= threads <= 1024:
            raise ValueError(f"a block has 1 to 1024 threads, not {threads}")
        macros = tuple(sorted(f"-D{macro}={value}" for macro, value in defines.items()))
        library = self._libraries.get((file, *macros))
        if library is None:
            library = ctypes.CDLL(str(self._library(file, macros)))
            self._libraries[file, *macros] = library
        return HostKernel(self, library, name, threads, shared_bytes)

    def _library(self, file: str, macros: tuple[str, ...]) -> Path:
        engine_key = _digest(sorted(SHIM.iterdir()), self._flags)
        headers = [*sorted(self._sources.rglob("*.cuh")), *sorted(SOURCES.rglob("*.cuh")), self._sources / file]
        library = self._cache / f"{Path(file).stem}-{_digest(headers, (engine_key, *macros))}.so"
        if not library.exists():
            engine = [self._engine(part, engine_key) for part in ("engine", "collectives")]
            with _made(library) as target:
                if target is not None:
                    self._link(self._sources / file, macros, engine, target)
        return library

    def _engine(self, part: str, key: str) -> Path:
        made = self._cache / f"{part}-{key}.o"
        with _made(made) as target:
            if target is not None:
                _run(["g++", *self._flags, "-O3", "-c", "-o", str(target), str(SHIM / f"{part}.cpp")])
        return made

    def _link(self, source: Path, macros: tuple[str, ...], engine: list[Path], target: Path) -> None:
        compiler = ["g++", *self._flags, *macros, "-x", "c++"]
        expanded = _run([*compiler, "-E", "-P", str(source)])
        names = re.findall(r'extern "C" \[\[gnu::noinline\]\] void (\w+)', expanded)
        wrapper = target.with_suffix(".cpp")
        entries = "".join(f"PAGEHOLD_ENTRY({name})\n" for name in names)
        wrapper.write_text(f'#include "{source}"\n#include "entry.h"\n{entries}')
        objects = ["-x", "none", *(str(part) for part in engine)]
        _run([*compiler, "-shared", "-o", str(target), str(wrapper), *objects])
        wrapper.unlink()


class _Launch(ctypes.Structure):
    """shim::Launch of engine.h."""

    _fields_ = (
        ("grid", ctypes.c_int * 3),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("schedule", ctypes.c_int),
        ("seed", ctypes.c_ulonglong),
    )


def _digest(files: list[Path], words: tuple[str, ...]) -> str:
    content = hashlib.sha256("\0".join(words).encode())
    for file in files:
        content.update(file.read_bytes())
    return content.hexdigest()[:24]


@contextmanager
def _made(file: Path) -> Iterator[Path | None]:
    """A name to make the file under, or None when it is there already. Processes that want the same one wait."""
    if file.exists():
        yield None
        return
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():
            yield None
            return
        target = file.with_suffix(f".{os.getpid()}.part")
        yield target
        target.replace(file)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompilationError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout
