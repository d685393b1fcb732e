"""How large a page pool may be on this machine: the cgroups' limits, free memory, free tmpfs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# More is rarely of use on a CPU, and memory that fills up with cached pages is a surprise.
DEFAULT_POOL_BYTES: Final = 4 << 30
_UNLIMITED: Final = 1 << 62
_ROOT: Final = Path("/")


def available_bytes(state_dir: Path, root: Path = _ROOT) -> int:
    """The least of what the tmpfs, the machine and the cgroups of this process still give.

    root: where /proc and /sys are.
    """
    stat = os.statvfs(state_dir)
    return min([stat.f_bavail * stat.f_frsize, _meminfo_available(root), *_cgroup_room(root)])


def default_pool_bytes(state_dir: Path, fraction: float) -> int:
    return min(int(available_bytes(state_dir) * fraction), DEFAULT_POOL_BYTES)


def _meminfo_available(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _UNLIMITED


def _cgroup_room(root: Path) -> list[int]:
    """What each cgroup that holds this process, and each above it, still allows; in any order."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    room: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: one hierarchy for all controllers
            for folder in _up(root / "sys/fs/cgroup", path):
                room += _left(folder, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            for folder in _up(root / "sys/fs/cgroup/memory", path):
                room += _left(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return room


def _up(mount: Path, path: str) -> Iterator[Path]:
    """The cgroup and all above it. In a container without a cgroup namespace only the mount itself may exist."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> list[int]:
    """Empty when the group has no limit. File cache that nobody uses counts as free: the kernel gives it up first."""
    try:
        left = int((folder / limit).read_text()) - int((folder / usage).read_text())
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == reclaimable:
                left += int(value)
    except (OSError, ValueError):
        return []  # no such controller, or "max"
    return [max(left, 0)]
