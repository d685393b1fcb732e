"""Planted bugs: a copy of the kernels' sources with one change, which the usual comparison must notice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final, NamedTuple

from kernels.cuda.device import SOURCES
from tests.kernels.cuda.checks import Check
from tests.kernels.cuda.host import SCHEDULES, HostDevice, LaunchError

TRIED: Final = (*SCHEDULES, *(f"random:{seed}" for seed in range(2, 6)))


class Mutation(NamedTuple):
    """What a careless change would do. old: text that is in the file exactly once."""

    name: str
    file: str
    old: str
    new: str
    check: Check


def planted(mutation: Mutation, folder: Path) -> Path:
    """The folder of the changed sources."""
    sources = folder / "cuda"
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    file = sources / mutation.file
    text = file.read_text()
    count = text.count(mutation.old)
    if count != 1:
        raise ValueError(f"{mutation.name}: {mutation.old!r} is {count} times in {mutation.file}, not once")
    file.write_text(text.replace(mutation.old, mutation.new))
    return sources


def noticed(check: Check, sources: Path, cache: Path) -> str | None:
    """The first schedule under which the check fails, None if there is none."""
    device = HostDevice(cache, sources=sources)
    for device.schedule in TRIED:
        try:
            check(device)
        except (AssertionError, LaunchError):
            return device.schedule
    return None
