"""A port that this supervisor's frontends share, and nobody else."""

from __future__ import annotations

import socket

import pytest

from services.supervisor.port import PortBusy, SharedPort
from tests.conftest import free_port


def listens(port: int, shared: bool) -> socket.socket:
    """As gRPC does it."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
    one.bind(("127.0.0.1", port))
    one.listen()
    return one


@pytest.mark.parametrize("listeners", [0, 2])
def test_frontends_share_it_and_strangers_do_not(listeners: int) -> None:
    port = free_port()
    held = SharedPort.take(f"127.0.0.1:{port}")
    assert held.is_shared
    own = [listens(port, shared=True) for _ in range(listeners)]
    with pytest.raises(OSError, match="in use"):
        listens(port, shared=False)
    with pytest.raises(PortBusy, match=f"cannot listen on 127.0.0.1:{port}: in use or not allowed"):
        SharedPort.take(f"127.0.0.1:{port}")
    for one in own:
        one.close()
    held.close()
    SharedPort.take(f"127.0.0.1:{port}").close()


def test_nobody_connects_to_what_is_only_held() -> None:
    port = free_port()
    held = SharedPort.take(f"localhost:{port}")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    held.close()


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_in_use_is_refused(shared: bool) -> None:
    port = free_port()
    with listens(port, shared), pytest.raises(PortBusy):
        SharedPort.take(f"127.0.0.1:{port}")


def test_connections_that_are_closing_do_not_hold_it_up() -> None:
    port = free_port()
    with listens(port, shared=False) as former:
        client = socket.create_connection(("127.0.0.1", port))
        former.accept()[0].close()
        assert client.recv(1) == b""
        client.close()
    SharedPort.take(f"127.0.0.1:{port}").close()


def test_both_families() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    port = free_port()
    for listen in (f"[::1]:{port}", f"[::]:{port}", f":{port}"):
        held = SharedPort.take(listen)
        with pytest.raises(PortBusy):
            SharedPort.take(f"[::1]:{port}")
        held.close()


@pytest.mark.parametrize("listen", ["unix:/tmp/x.sock", "127.0.0.1:0", "no-such-host.invalid:7", "nonsense", "x:http"])
def test_what_is_no_port_is_left_to_the_frontend(listen: str) -> None:
    assert not SharedPort.take(listen).is_shared


def test_several_frontends_need_a_port_to_share() -> None:
    alone = SharedPort([])
    alone.check(1)
    with pytest.raises(PortBusy, match="--frontends 2 needs a TCP port"):
        alone.check(2)
