"""How large a page pool may be on this machine: the cgroup's limit, free memory, free tmpfs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

# More is rarely of use on a CPU, and memory that fills up with cached pages is a surprise.
DEFAULT_POOL_BYTES: Final = 4 << 30


def available_bytes(state_dir: Path) -> int:
    """The least of what the tmpfs, the machine and the cgroups of this process still give."""
    stat = os.statvfs(state_dir)
    return min([stat.f_bavail * stat.f_frsize, _meminfo_available(), *_cgroup_room()])


def default_pool_bytes(state_dir: Path, fraction: float) -> int:
    return min(int(available_bytes(state_dir) * fraction), DEFAULT_POOL_BYTES)


def _meminfo_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _cgroup_room() -> list[int]:
    room: list[int] = []
    v2 = Path("/sys/fs/cgroup")
    v1 = v2 / "memory"
    for limit, usage in (
        (v2 / "memory.max", v2 / "memory.current"),
        (v1 / "memory.limit_in_bytes", v1 / "memory.usage_in_bytes"),
    ):
        try:
            room.append(int(limit.read_text()) - int(usage.read_text()))
        except (OSError, ValueError):
            continue  # no such controller, or "max"
    return room
