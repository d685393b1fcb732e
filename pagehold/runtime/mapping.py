"""Files mapped without a descriptor: a process may map far more of them than it may have open.

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


def map_descriptor(fd: int, nbytes: int, writable: bool) -> memoryview:
    """The same for the first bytes of an open file, which may be closed at once. Raises OSError, ValueError."""
    if nbytes <= 0:
        raise ValueError("cannot map an empty file")
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    address = _LIBC.mmap(None, nbytes, protection, mmap.MAP_SHARED, fd, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    _LIBC.madvise(address, nbytes, mmap.MADV_DONTFORK)
    owner = (ctypes.c_ubyte * nbytes).from_address(address)
    unmap = weakref.finalize(owner, _LIBC.munmap, address, nbytes)
    unmap.atexit = False  # a thread may still read; the end of the process unmaps
    view = memoryview(owner).cast("B")
    return view if writable else view.toreadonly()
