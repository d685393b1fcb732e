"""NVRTC, the compiler that CuPy uses, called directly: it needs neither a driver nor a GPU. And what is in a cubin."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from kernels.cuda.device import SOURCES, CompilationError

CACHE: Final = Path(__file__).parents[3] / "build" / "cubins"


class Usage(NamedTuple):
    """What one kernel takes; bytes of a thread's stack, of a block's static shared memory."""

    registers: int
    stack: int
    local: int
    shared: int


@cache
def toolkit() -> Path:
    """The folder with `bin` and `lib` of the wheels `nvidia-cuda-*`."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) / "cu13" for place in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        if (folder / "lib" / "libnvrtc.so.13").exists():
            return folder
    raise FileNotFoundError(f"no libnvrtc.so.13 in {folders}: install nvidia-cuda-nvrtc of CUDA 13")


@cache
def _library() -> ctypes.CDLL:
    folder = toolkit() / "lib"
    for builtins in folder.glob("libnvrtc-builtins.so.*"):  # which NVRTC opens by name
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(folder / "libnvrtc.so.13"))


def compile_cubin(file: str, options: tuple[str, ...]) -> Path:
    """Compiles a file of `kernels/cuda`, once for each content and set of options.

    Raises CompilationError with the compiler's log.
    """
    key = hashlib.sha256("\0".join((str(toolkit()), file, *options)).encode())
    for source in (SOURCES / file, *sorted(SOURCES.rglob("*.cuh"))):
        key.update(source.read_bytes())
    cubin = CACHE / f"{Path(file).stem}-{key.hexdigest()[:24]}.cubin"
    if not cubin.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        made = cubin.with_suffix(f".{os.getpid()}")
        made.write_bytes(_compile(SOURCES / file, options))
        made.replace(cubin)
    return cubin


def usage(cubin: Path) -> dict[str, Usage]:
    """Of each kernel, by name."""
    printed = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
    rows = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", printed)
    return {name: Usage(int(reg), int(stack), int(local), int(shared)) for name, reg, stack, shared, local in rows}


def instructions(cubin: Path) -> dict[str, frozenset[str]]:
    """The instructions of each kernel, by name; their modifiers included, such as HMMA.16816.F32.BF16."""
    parts = re.split(r"Function : (\w+)", _tool("cuobjdump", "-sass", str(cubin)))[1:]
    found = re.compile(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)")
    return {name: frozenset(found.findall(text)) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def _tool(name: str, *arguments: str) -> str:
    folder = toolkit() / "bin"
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}  # cuobjdump looks for nvdisasm
    done = subprocess.run([folder / name, *arguments], capture_output=True, text=True, env=environment, check=True)
    return done.stdout


def _compile(source: Path, options: tuple[str, ...]) -> bytes:
    nvrtc = _library()
    program = ctypes.c_void_p()
    code, name = source.read_bytes(), source.name.encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, name, 0, None, None) == 0
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            log = _content(nvrtc, "ProgramLog", program)
            raise CompilationError(f"{source} {' '.join(options)}\n{log.decode()}")
        return _content(nvrtc, "CUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _content(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    assert nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size)) == 0
    content = ctypes.create_string_buffer(size.value)
    assert nvrtc[f"nvrtcGet{what}"](program, content) == 0
    return content.raw
