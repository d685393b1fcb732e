"""What goes over leash.sock: who, which pool, and file descriptors, which gRPC cannot carry.

executor ─▶ manager   before every attach: its own pidfd; and the descriptor of the pool that it still has
manager ─▶ executor   before the answer to an attach of a VMM pool: the pool's descriptor
"""

from __future__ import annotations

import os
import socket
import struct
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

NO_POOL: Final = bytes(16)
_FORMAT: Final = struct.Struct("<8s16s16s")
_MAGIC: Final = b"PGHLEASH"
_MOST_FDS: Final = 2


class NotOurs(Exception):
    """A packet of another protocol."""


@dataclass(slots=True)
class Packet:
    executor_id: bytes  # 16 bytes
    pool_uuid: bytes  # 16 bytes; NO_POOL: the descriptors are of no pool
    fds: list[int] = field(default_factory=list)  # the receiver's from here on

    def close(self) -> None:
        """Closes what has not been taken out."""
        while self.fds:
            os.close(self.fds.pop())


def connect(path: Path) -> socket.socket:
    """Raises OSError when nobody listens, or a manager that hangs has too many waiting: it never blocks."""
    leash = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    leash.setblocking(False)
    try:
        leash.connect(os.fspath(path))
    except OSError:
        leash.close()
        raise
    leash.setblocking(True)
    return leash


def send(leash: socket.socket, executor_id: bytes, pool_uuid: bytes, fds: list[int]) -> None:
    """fds: stay the sender's. Raises OSError."""
    socket.send_fds(leash, [_FORMAT.pack(_MAGIC, executor_id, pool_uuid)], fds)


def receive(leash: socket.socket) -> Packet | None:
    """The next packet; None at the end. Raises OSError or NotOurs."""
    fds = array("i")
    # Not by `socket.recv_fds`: that ignores its flags in Python 3.11, and a child could inherit a descriptor.
    room = socket.CMSG_LEN(_MOST_FDS * fds.itemsize)
    data, ancillary, _, _ = leash.recvmsg(_FORMAT.size + 1, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, rights in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
    packet = Packet(b"", b"", fds.tolist())
    if not data:
        packet.close()
        return None
    if len(data) != _FORMAT.size or not data.startswith(_MAGIC):
        packet.close()
        raise NotOurs(f"a packet of {len(data)} bytes")
    _, packet.executor_id, packet.pool_uuid = _FORMAT.unpack(data)
    return packet


def pidfd_of_self() -> int:
    return os.pidfd_open(os.getpid())


def is_pidfd(fd: int) -> bool:
    """Anything else could be readable while its process lives."""
    return "pidfd" in os.readlink(f"/proc/self/fd/{fd}")
