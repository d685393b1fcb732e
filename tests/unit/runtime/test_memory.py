"""How much memory there is, by cgroup files that the test makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagehold.runtime import memory
from pagehold.runtime.memory import available_bytes

GIB = 1 << 30
MIB = 1 << 20


class System:
    """A /proc and a /sys."""

    def __init__(self, root: Path, cgroup: str, available: int = 64 * GIB) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {available // 1024} kB\n")
        (root / "proc/self/cgroup").write_text(cgroup)

    def group(self, path: str, limit: str, usage: int, cache: int, version: int = 2) -> None:
        names = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        folder = self.root / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{names[2]} {cache}\nslab 3\n")


@pytest.fixture(autouse=True)
def large_tmpfs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stat:
        f_bavail, f_frsize = 1 << 30, 4096

    monkeypatch.setattr(memory.os, "statvfs", lambda path: Stat)


def test_free_memory_alone(tmp_path: Path) -> None:
    System(tmp_path, "0::/\n", available=3 * GIB)
    assert available_bytes(tmp_path, tmp_path) == 3 * GIB


def test_the_tmpfs_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stat:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(memory.os, "statvfs", lambda path: Stat)
    System(tmp_path, "0::/\n")
    assert available_bytes(tmp_path, tmp_path) == 40960


def test_the_limit_of_this_process_group_and_of_every_one_above(tmp_path: Path) -> None:
    system = System(tmp_path, "0::/user.slice/pagehold.service\n")
    system.group("user.slice/pagehold.service", "max", GIB, 0)
    assert available_bytes(tmp_path, tmp_path) == 64 * GIB
    system.group("user.slice/pagehold.service", str(8 * GIB), GIB, 0)
    assert available_bytes(tmp_path, tmp_path) == 7 * GIB
    system.group("user.slice", str(6 * GIB), 4 * GIB, 0)
    assert available_bytes(tmp_path, tmp_path) == 2 * GIB
    system.group("elsewhere", "1", 0, 0)
    assert available_bytes(tmp_path, tmp_path) == 2 * GIB


def test_file_cache_that_nobody_uses_is_free(tmp_path: Path) -> None:
    system = System(tmp_path, "0::/\n")
    system.group("", str(4 * GIB), 4 * GIB - 100 * MIB, GIB)
    assert available_bytes(tmp_path, tmp_path) == GIB + 100 * MIB


def test_version_1(tmp_path: Path) -> None:
    system = System(tmp_path, "9:cpu,cpuacct:/job\n4:memory:/job/7\n")
    system.group("memory/job/7", str(5 * GIB), GIB, 0, version=1)
    system.group("memory", str(9223372036854771712), GIB, 0, version=1)
    assert available_bytes(tmp_path, tmp_path) == 4 * GIB


def test_a_container_sees_its_own_group_at_the_mount(tmp_path: Path) -> None:
    system = System(tmp_path, "0::/../../docker/0123abcd\n")
    system.group("", str(2 * GIB), GIB, 0)
    assert available_bytes(tmp_path, tmp_path) == GIB


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    system = System(tmp_path, "0::/\n")
    system.group("", str(GIB), 2 * GIB, 0)
    assert available_bytes(tmp_path, tmp_path) == 0


def test_the_real_machine_has_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert available_bytes(tmp_path) > 0
