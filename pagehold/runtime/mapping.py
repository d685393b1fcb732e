"""Files mapped without a descriptor: a process may map far more of them than it may have open. Large ones lie so that
the kernel can map them by huge pages.

`mmap.mmap` keeps a duplicate of its descriptor for as long as the mapping lives (until Python 3.13, which has
`trackfd`). With one log a request, a thousand requests would reach the usual limit of 1024.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED: Final = ctypes.c_void_p(-1).value
_MADV_COLLAPSE: Final = 25  # since Linux 6.1
_MAP_FIXED: Final = 0x10

HUGE_PAGE: Final = 2 << 20


def map_shared(path: Path, writable: bool) -> memoryview:
    """The whole file, shared; it is unmapped when the last view of it is gone.

    A child that is forked does not inherit it. Raises OSError, FileNotFoundError among them; ValueError for an
    empty file.
    """
    fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        return map_descriptor(fd, os.fstat(fd).st_size, writable)
    finally:
        os.close(fd)


def map_descriptor(fd: int, nbytes: int, writable: bool, offset: int = 0) -> memoryview:
    """The same for `nbytes` of an open file, which may be closed at once. Raises OSError, ValueError."""
    if nbytes <= 0:
        raise ValueError("cannot map an empty file")
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    address = _map(fd, nbytes, protection, offset)
    _LIBC.madvise(address, nbytes, mmap.MADV_DONTFORK)
    owner = (ctypes.c_ubyte * nbytes).from_address(address)
    unmap = weakref.finalize(owner, _LIBC.munmap, address, nbytes)
    unmap.atexit = False  # a thread may still read; the end of the process unmaps
    view = memoryview(owner).cast("B")
    return view if writable else view.toreadonly()


def allocate(fd: int, offset: int, nbytes: int) -> None:
    """Puts memory behind a part of a file in shared memory: huge pages where the kernel can, for their readers miss
    fewer translations.

    offset: a multiple of HUGE_PAGE. Raises OSError where the memory is not there, and some of it may be taken then.
    """
    whole = nbytes // HUGE_PAGE * HUGE_PAGE
    if whole:
        # The kernel makes a huge page of what has a small one. To gather many of them costs several times as much.
        for start in range(offset, offset + whole, HUGE_PAGE):
            os.posix_fallocate(fd, start, mmap.PAGESIZE)
        address = _map(fd, whole, mmap.PROT_READ | mmap.PROT_WRITE, offset)
        _LIBC.madvise(address, whole, _MADV_COLLAPSE)
        _LIBC.munmap(address, whole)
    os.posix_fallocate(fd, offset, nbytes)


def _map(fd: int, nbytes: int, protection: int, offset: int) -> int:
    """Shared; from HUGE_PAGE on at a multiple of it. Raises OSError."""
    if nbytes < HUGE_PAGE:
        return _checked(_LIBC.mmap(None, nbytes, protection, mmap.MAP_SHARED, fd, offset))
    size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    room = _checked(_LIBC.mmap(None, size + HUGE_PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0))
    before = -room % HUGE_PAGE
    address = room + before
    if before:
        _LIBC.munmap(room, before)
    _LIBC.munmap(address + size, HUGE_PAGE - before)
    try:
        return _checked(_LIBC.mmap(address, nbytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, offset))
    except OSError:
        _LIBC.munmap(address, size)
        raise


def _checked(address: int) -> int:
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return address
