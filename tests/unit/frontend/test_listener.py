"""A listener that leaves its port refuses nobody, neither those who have connected nor those who come."""

from __future__ import annotations

import asyncio
import socket

from services.frontend import listener
from tests.conftest import free_port


def shared(port: int) -> socket.socket:
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind(("127.0.0.1", port))
    one.listen()
    one.setblocking(False)
    return one


async def test_who_has_connected_is_taken_and_who_comes_goes_elsewhere() -> None:
    port = free_port()
    loop = asyncio.get_running_loop()
    old = shared(port)
    early = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    leaving = asyncio.create_task(listener.leave(port))
    await asyncio.sleep(0.02)
    assert not leaving.done()
    # Whoever comes now is not answered, and asks again, until the port's other listener does it. (That one is made
    # after this one has left, for it is of the same process here.)
    late = socket.socket()
    late.setblocking(False)
    connecting = asyncio.create_task(loop.sock_connect(late, ("127.0.0.1", port)))
    taken = [(await loop.sock_accept(old))[0] for _ in early]
    await leaving
    assert not connecting.done(), "its handshake was answered by one who leaves"
    new = shared(port)
    await asyncio.wait_for(connecting, 30)
    assert (await loop.sock_accept(new))[1] == late.getsockname()
    # Both ends are in this process: the clients' ones have ports of their own.
    assert listener.count_connections(port) == len(taken)
    for one in (*early, *taken, late):
        one.close()
    assert listener.count_connections(port) == 0
    new.close()
    old.close()
