"""Files mapped without a descriptor."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pagehold.runtime.mapping import HUGE_PAGE, allocate, map_descriptor, map_shared


def mappings(path: Path) -> int:
    return sum(line.endswith(str(path)) for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_mapping_takes_no_descriptor_and_goes_with_its_last_view(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    gc.collect()  # what other tests have left would be closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    views = [map_shared(path, writable=True) for _ in range(100)]
    assert len(os.listdir("/proc/self/fd")) <= before
    assert mappings(path) > 0
    words = np.frombuffer(views[0], np.uint64)
    words[1] = 7
    assert path.read_bytes()[8] == 7
    del views
    gc.collect()
    assert mappings(path) == 1
    assert words[1] == 7
    del words
    gc.collect()
    assert mappings(path) == 0


def test_what_is_mapped_to_be_read_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    view = map_shared(path, writable=False)
    assert bytes(view) == b"abc" and view.readonly
    with pytest.raises(TypeError):
        view[0] = 1


def test_an_empty_file_and_none_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        map_shared(tmp_path / "empty", writable=False)
    with pytest.raises(FileNotFoundError):
        map_shared(tmp_path / "none", writable=False)


@pytest.fixture
def shared_file() -> Iterator[int]:
    path = Path(f"/dev/shm/pagehold-test-{os.getpid()}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    path.unlink()
    yield fd
    os.close(fd)


def huge_bytes(address: int) -> int:
    """Of the mapping that begins there, how much this process reads by huge pages."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.startswith(f"{address:x}-"))
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("ShmemPmdMapped"))


def test_large_files_are_mapped_so_that_huge_pages_fit(shared_file: int) -> None:
    nbytes = 3 * HUGE_PAGE + 5000
    os.ftruncate(shared_file, nbytes)
    views = [map_descriptor(shared_file, nbytes, writable=True) for _ in range(5)]
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in views]
    assert all(address % HUGE_PAGE == 0 for address in addresses)
    views[0][nbytes - 1] = 7
    assert views[4][nbytes - 1] == 7
    part = map_descriptor(shared_file, 5000, writable=False, offset=3 * HUGE_PAGE)
    assert len(part) == 5000 and part[4999] == 7


def test_what_is_allocated_has_memory_and_keeps_what_it_holds(shared_file: int) -> None:
    nbytes = 3 * HUGE_PAGE + 4096
    os.ftruncate(shared_file, 2 * nbytes)
    view = map_descriptor(shared_file, 2 * nbytes, writable=True)
    view[HUGE_PAGE + 12345] = 9
    allocate(shared_file, 0, nbytes)
    assert os.fstat(shared_file).st_blocks * 512 == nbytes
    assert view[HUGE_PAGE + 12345] == 9 and sum(view[:nbytes]) == 9


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_what_is_allocated_is_read_by_huge_pages(shared_file: int) -> None:
    os.ftruncate(shared_file, 4 * HUGE_PAGE)
    allocate(shared_file, 0, 3 * HUGE_PAGE)
    view = map_descriptor(shared_file, 4 * HUGE_PAGE, writable=True)
    assert sum(view[::HUGE_PAGE]) == 0
    assert huge_bytes(ctypes.addressof(ctypes.c_char.from_buffer(view))) == 3 * HUGE_PAGE


def test_memory_that_is_not_there_is_an_error(shared_file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        allocate(shared_file, 0, HUGE_PAGE)
