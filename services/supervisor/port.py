"""The frontends' port, held for a supervisor's life.

Several frontends listen on it by SO_REUSEPORT, so that one can go after another has come. To the
kernel a stranger of the same user would be one more of them. So the port is taken for this
supervisor alone first, and a socket that never listens again keeps it: whoever wants the port for
itself, as every other supervisor does, finds it in use.
"""

from __future__ import annotations

import socket
from typing import Self


class PortBusy(Exception):
    """The message is for the operator."""


class SharedPort:
    """Addresses of one `--listen` that frontends share."""

    def __init__(self, held: list[socket.socket]) -> None:
        self._held = held

    @classmethod
    def take(cls, listen: str) -> Self:
        """Raises PortBusy. Of what is no TCP port of a known address, nothing is held: frontends say what is wrong."""
        held: list[socket.socket] = []
        addresses = _addresses(listen)
        both = len({family for family, _ in addresses}) > 1
        for family, address in addresses:
            try:
                held.append(_hold(family, address, only=both))
            except OSError as error:
                for one in held:
                    one.close()
                message = f"cannot listen on {listen}: in use or not allowed; choose another --listen"
                raise PortBusy(message) from error
        return cls(held)

    def check(self, frontends: int) -> None:
        """Raises PortBusy where so many cannot listen."""
        if frontends > 1 and not self.is_shared:
            raise PortBusy(f"--frontends {frontends} needs a TCP port to share; choose another --listen")

    @property
    def is_shared(self) -> bool:
        """Whether several frontends can listen there."""
        return bool(self._held)

    def close(self) -> None:
        for one in self._held:
            one.close()
        self._held.clear()


def _addresses(listen: str) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    """HOST:PORT or [HOST]:PORT as addresses. Empty for a Unix socket, and for port 0, which is any."""
    host, _, port = listen.rpartition(":")
    if not port.isdigit() or int(port) == 0 or listen.startswith(("unix:", "unix-abstract:", "vsock:")):
        return []
    try:
        found = socket.getaddrinfo(
            host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError:
        return []
    unique = {(family, sockaddr[:2]) for family, _, _, _, sockaddr in found}
    return [(family, (str(name), int(number))) for family, (name, number) in sorted(unique, key=str)]


def _hold(family: socket.AddressFamily, address: tuple[str, int], only: bool) -> socket.socket:
    """A socket bound there: alone at first, then for all that share the port, and listening no more.

    only: not for the other family as well, as `[::]` is.
    """
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Connections of a former server may still be closing: they are in nobody's way.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        held.bind(address)
        # Only one socket can listen without sharing, and only that makes this one the first.
        held.listen(1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        held.shutdown(socket.SHUT_RD)
    except BaseException:
        held.close()
        raise
    return held
