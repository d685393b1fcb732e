"""What the machine has, read from it as it is found: nothing here changes a clock, a limit or a mode."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from gpu.report import Machine

_FIELDS: Final = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
)
_PACKAGES: Final = ("pagehold", "torch", "cupy-cuda13x", "cuda-bindings", "numpy", "transformers", "flashinfer-python")
NO_GPU: Final = "no GPU"


def examine(repository: Path) -> Machine:
    """Where there is no driver the GPU's name is `NO_GPU`."""
    words = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    answer = _output(words).splitlines()
    found = [part.strip() for part in answer[0].split(",")] if answer else []
    if len(found) != len(_FIELDS):
        found = [NO_GPU, "", "0", *["?"] * 4]
    name, driver, memory, sm, mem, most_sm, most_mem = found
    return Machine(
        gpu=name,
        driver=driver,
        memory_gib=float(memory) / 1024,
        clocks=f"SM {sm} of {most_sm} MHz, memory {mem} of {most_mem} MHz before the part",
        processors=len(os.sched_getaffinity(0)),
        commit=_commit(repository),
        versions=dict(_versions()),
    )


def _commit(repository: Path) -> str:
    commit = _output(["git", "-C", str(repository), "rev-parse", "--short=12", "HEAD"])
    changed = _output(["git", "-C", str(repository), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit or 'unknown'}{' with changes' if changed else ''}"


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in _PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found


def _output(words: list[str]) -> str:
    """Empty where the command is missing or fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
