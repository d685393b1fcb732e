"""A file system of its own that can be filled up."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Tmpfs:
    """Mounted at `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._filler = root / "somebody-elses"

    @property
    def free(self) -> int:
        stat = os.statvfs(self.root)
        return stat.f_bavail * stat.f_frsize

    def fill(self, spare: int = 0) -> None:
        """Somebody else takes all but `spare` bytes of what is left."""
        fd = os.open(self._filler, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(fd, os.fstat(fd).st_size, self.free - spare)
        finally:
            os.close(fd)
        assert self.free <= spare

    def drain(self) -> None:
        """And gives it back."""
        self._filler.unlink(missing_ok=True)


@contextmanager
def tmpfs(size: str) -> Iterator[Tmpfs]:
    """size: as mount takes it, such as 300m. Skips the test where this process may not mount."""
    with tempfile.TemporaryDirectory(prefix="pagehold-tmpfs-") as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "pagehold-test", folder]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
        try:
            yield Tmpfs(Path(folder))
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
