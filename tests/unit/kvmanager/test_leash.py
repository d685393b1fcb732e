"""leash.sock: greetings, offers, and the wait for a death; each process's pidfd is a real one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kvmanager.device import packets
from kvmanager.device.leash import Leash
from kvmanager.device.packets import NO_POOL

ONE, TWO, POOL = b"1" * 16, b"2" * 16, b"p" * 16


@pytest.fixture
async def leash(tmp_path: Path) -> AsyncIterator[Leash]:
    leash = Leash(tmp_path / "leash.sock")
    leash.start()
    yield leash
    leash.close()


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def greet(tmp_path: Path, who: bytes, pid: int, pool: bytes = NO_POOL, fds: tuple[int, ...] = ()) -> socket.socket:
    connection = packets.connect(tmp_path / "leash.sock")
    connection.settimeout(5)
    pidfd = os.pidfd_open(pid)
    packets.send(connection, who, pool, [pidfd, *fds])
    os.close(pidfd)
    return connection


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_greeting_is_waited_for_but_not_for_ever(leash: Leash, tmp_path: Path) -> None:
    assert not await leash.greeting(ONE, 0.05)
    waiting = asyncio.create_task(leash.greeting(ONE, 5))
    await asyncio.sleep(0)
    with greet(tmp_path, ONE, os.getpid()):
        assert await waiting
        assert not await leash.greeting(TWO, 0.05)
        assert not await leash.greeting(ONE, 0.05)  # the next attach has a greeting of its own
    with greet(tmp_path, ONE, os.getpid()):
        assert await leash.greeting(ONE, 5)


async def test_an_attach_waits_until_all_others_are_dead(
    leash: Leash, tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    with greet(tmp_path, ONE, process.pid):
        assert await leash.greeting(ONE, 5)
    process.send_signal(signal.SIGSTOP)  # and its connection has ended: that proves nothing
    with greet(tmp_path, TWO, os.getpid()):
        assert await leash.greeting(TWO, 5)
        waiting = asyncio.create_task(leash.others_gone(TWO))
        done, _ = await asyncio.wait([waiting], timeout=0.2)
        assert not done
        process.kill()
        await asyncio.wait_for(waiting, 5)
        await leash.others_gone(TWO)  # the dead one is forgotten
        assert list(leash._executors) == [TWO]


async def test_who_gives_up_waiting_leaves_nothing(
    leash: Leash, tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    with greet(tmp_path, ONE, process.pid):
        assert await leash.greeting(ONE, 5)
        held = descriptors()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(leash.others_gone(TWO), 0.02)
        assert descriptors() == held


async def test_a_pool_is_offered_to_whoever_names_it_and_taken_once(leash: Leash, tmp_path: Path) -> None:
    read, write = os.pipe()
    with greet(tmp_path, ONE, os.getpid(), POOL, (write,)):
        assert await leash.greeting(ONE, 5)
        os.close(write)
        assert leash.take_offer(ONE, b"q" * 16) is None and leash.take_offer(TWO, POOL) is None
        fd = leash.take_offer(ONE, POOL)
        assert fd is not None and leash.take_offer(ONE, POOL) is None
        assert not os.get_inheritable(fd)
        os.write(fd, b"here")
        assert os.read(read, 10) == b"here"
        os.close(fd)
    os.close(read)


async def test_an_offer_ends_with_its_connection_or_with_the_next_greeting(leash: Leash, tmp_path: Path) -> None:
    read, write = os.pipe()
    connection = greet(tmp_path, ONE, os.getpid(), POOL, (write,))
    assert await leash.greeting(ONE, 5)
    again = greet(tmp_path, ONE, os.getpid(), POOL, (write,))
    os.close(write)
    connection.close()
    assert await leash.greeting(ONE, 5)
    again.close()
    await asyncio.sleep(0.05)
    assert leash.take_offer(ONE, POOL) is None
    assert os.read(read, 1) == b""  # nobody holds the other end
    os.close(read)


async def test_the_pools_descriptor_is_handed_over(leash: Leash, tmp_path: Path) -> None:
    read, write = os.pipe()
    with greet(tmp_path, ONE, os.getpid()) as connection:
        assert await leash.greeting(ONE, 5)
        leash.hand_over(ONE, POOL, write)
        leash.hand_over(TWO, POOL, write)  # it never greeted
        packet = await asyncio.to_thread(packets.receive, connection)
        assert packet is not None and (packet.executor_id, packet.pool_uuid) == (ONE, POOL)
        os.write(packet.fds[0], b"here")
        assert os.read(read, 10) == b"here"
        packet.close()
    await asyncio.sleep(0.05)
    leash.hand_over(ONE, POOL, write)  # it is gone
    os.close(read)
    os.close(write)


async def test_what_is_no_greeting_is_dropped_with_its_descriptors(leash: Leash, tmp_path: Path) -> None:
    read, write = os.pipe()
    held = descriptors()
    for data, fds in (
        (b"?", [write]),
        (b"PGHLEASH" + bytes(33), [write]),
        (b"PGHLEASH" + bytes(32), [write]),  # not a pidfd
        (b"PGHLEASH" + bytes(32), []),
    ):
        with packets.connect(tmp_path / "leash.sock") as connection:
            connection.settimeout(5)
            socket.send_fds(connection, [data], fds)
            assert await asyncio.to_thread(connection.recv, 1) == b""
    await asyncio.sleep(0.02)
    assert descriptors() == held and not leash._executors
    os.close(read)
    os.close(write)


def test_a_manager_that_hangs_blocks_nobody_who_connects(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(os.fspath(tmp_path / "leash.sock"))
        listener.listen(1)
        for _ in range(2):  # as many as wait
            packets.connect(tmp_path / "leash.sock").close()
        with pytest.raises(BlockingIOError):
            packets.connect(tmp_path / "leash.sock")
