"""This process's sockets on its public port: how it leaves a port that others share, refusing nobody.

gRPC can only close a listener as it is, and the kernel then resets whoever has just connected to it.
So new handshakes are left unanswered for a moment, which clients take for a lost packet; what has
connected is taken; then the listener is closed, and the port's other listeners get the handshakes,
repeated or new.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import Final

_SO_ATTACH_FILTER: Final = 26
_TCP_INFO_BYTES: Final = 104
_WAITING_OFFSET: Final = 24  # tcpi_unacked: of a listener, those who wait to be taken
_LEAST_SECONDS: Final = 0.05  # for handshakes that are under way
_MOST_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 0.005
# Classic BPF over the TCP header: of its flags, byte 13, SYN without ACK is dropped, all else is kept whole.
_NO_NEW_HANDSHAKE: Final = (
    (0x30, 0, 0, 13),  # load byte 13
    (0x54, 0, 0, 0x12),  # of it, SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone?
    (0x06, 0, 0, 0),
    (0x06, 0, 0, 0xFFFFFFFF),
)


async def leave(port: int) -> None:
    """No new connection comes from here on; those that have come stay."""
    listeners = [one for one in _sockets(port) if _listens(one)]
    try:
        for one in listeners:
            _answer_no_more(one)
        start = time.monotonic()
        while (passed := time.monotonic() - start) < _LEAST_SECONDS or (
            passed < _MOST_SECONDS and any(_waiting(one) for one in listeners)
        ):
            await asyncio.sleep(_POLL_SECONDS)
        for one in listeners:
            one.shutdown(socket.SHUT_RD)
    finally:
        for one in listeners:
            one.close()


def count_connections(port: int) -> int:
    """Of clients that are connected to the port here."""
    found = 0
    for one in _sockets(port):
        found += _is_connected(one)
        one.close()
    return found


def _sockets(port: int) -> Iterator[socket.socket]:
    """Every TCP socket of this process with this local port, once, by a descriptor of its own."""
    seen = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{number}")
            if not name.startswith("socket:") or name in seen:
                continue
            seen.add(name)
            one = socket.socket(fileno=os.dup(int(number)))
        except OSError:
            continue  # closed meanwhile
        try:
            tcp = one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM
            if tcp and one.getsockname()[1] == port:
                yield one
                continue
        except OSError:
            pass
        one.close()


def _listens(one: socket.socket) -> bool:
    return bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _is_connected(one: socket.socket) -> bool:
    try:
        one.getpeername()
    except OSError:
        return False
    return True


def _waiting(one: socket.socket) -> int:
    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    return int(struct.unpack_from("I", info, _WAITING_OFFSET)[0])


def _answer_no_more(one: socket.socket) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _NO_NEW_HANDSHAKE))
    program = struct.pack("HL", len(_NO_NEW_HANDSHAKE), ctypes.addressof(code))
    try:
        one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except OSError:
        pass  # no such filters here: then somebody may have to connect again
