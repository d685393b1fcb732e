"""What a server does about file descriptors before it opens any: enough of them, and the first three in use."""

from __future__ import annotations

import errno
import os
import resource
from typing import Final

_SCARCITY: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))


def prepare() -> None:
    """The soft limit is raised to the hard one, which only `select` minds and nobody uses here; 0, 1 and 2 are open.

    What else would get a free one of these would be written into by every library that reports to stderr.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass  # unlimited by word, limited by the kernel: then what there is must do
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def is_scarcity(error: Exception) -> bool:
    """Whether the system lacks descriptors or memory for now: nothing is wrong with what was to be opened."""
    return isinstance(error, OSError) and error.errno in _SCARCITY
