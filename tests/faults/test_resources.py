"""What runs out beside running streams: shared memory, disks, descriptors. The streams go on byte for byte."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from pagehold.v1 import inference_pb2 as api
from tests.conftest import COMMAND, Stack, free_port
from tests.faults.streams import Load, generate, renamed, request, undisturbed
from tests.faults.test_kill import StartStack
from tests.faults.tmpfs import Tmpfs, tmpfs

pytestmark = pytest.mark.stack

SECONDS = 60.0  # far longer than anything here takes


@pytest.fixture
def shared_memory() -> Iterator[Tmpfs]:
    """Room for a pool of 256 MiB, its tables and some records."""
    with tmpfs("300m") as found:
        yield found


async def refusal(address: str, message: api.GenerateRequest) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as found:
        await generate(address, message)
    return found.value.code()


async def accepted_again(address: str, message: api.GenerateRequest) -> None:
    """Soon after what was lacking is there again."""
    give_up = time.monotonic() + SECONDS
    while True:
        try:
            await generate(address, message)
            return
        except grpc.aio.AioRpcError as error:
            assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
            assert time.monotonic() < give_up
            await asyncio.sleep(0.1)


def restarted(stack: Stack, component: str) -> int:
    """Kills it, and waits for the next one to be ready. Its pid."""
    before = stack.kill(component)
    give_up = time.monotonic() + SECONDS
    while (found := stack.status()["components"][component])["state"] != "ready" or found["pid"] == before:
        assert time.monotonic() < give_up, stack.log.read_text()[-3000:]
    return int(found["pid"])


def check_sound(stack: Stack) -> None:
    """Nothing lost, nothing left behind: no row is held, and no file contradicts another."""
    command = [*COMMAND, "fsck", "--json", "--state-dir", str(stack.state_dir)]
    report = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert report.returncode == 0, report.stdout + report.stderr
    give_up = time.monotonic() + SECONDS
    while (pool := stack.status()["pool"])["free"] < pool["pages"]:
        assert time.monotonic() < give_up, "pages are held by nobody"


def test_a_pool_larger_than_shared_memory_is_refused(shared_memory: Tmpfs) -> None:
    state = shared_memory.root / "state"
    command = [*COMMAND, "up", "--state-dir", str(state), "--listen", f"127.0.0.1:{free_port()}"]
    refused = subprocess.run([*command, "--kv-memory", "2GiB"], capture_output=True, text=True, timeout=SECONDS)
    assert refused.returncode == 78
    assert "does not fit" in refused.stderr and "choose a smaller --kv-memory" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not state.exists()


async def test_shared_memory_is_full_and_freed_again(start_stack: StartStack, shared_memory: Tmpfs) -> None:
    stack = start_stack(state_dir=shared_memory.root / "state", kv_memory="256MiB")
    # Not even the first page has memory yet. A request that was accepted waits for it.
    shared_memory.fill(spare=1 << 20)
    early = Load(stack.address, [request(90, tokens=16)])
    while not early.heard[0].accepted:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    assert not early.heard[0].tokens
    shared_memory.drain()
    assert await early.answers() == await undisturbed(stack.address, [request(90, tokens=16)])

    messages = [request(number, tokens=120) for number in range(4)]
    reference = await undisturbed(stack.address, messages)
    pids = {}
    load = Load(stack.address, messages, resume=True)
    await load.reach(10)
    shared_memory.fill()
    assert await refusal(stack.address, request(91)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    for component in ("kvmanager", "executor", "frontend"):
        pids[component] = restarted(stack, component)
    assert await refusal(stack.address, request(92)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await load.answers() == reference
    shared_memory.drain()
    await accepted_again(stack.address, request(93, tokens=8))
    assert stack.pids() == pids, "a component died by itself"
    check_sound(stack)


MESSAGES = renamed([request(number, tokens=160) for number in range(3)], "resources")


@contextmanager
def full_disk() -> Iterator[int]:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def unread_pipe() -> Iterator[int]:
    """Full from the start, so that whoever writes to it as to a file waits for ever."""
    read, write = os.pipe()
    # Of another description than the one that is handed on: that one still waits, as a shell's pipe does.
    filling = os.open(f"/proc/self/fd/{write}", os.O_WRONLY | os.O_NONBLOCK)
    try:
        while True:
            os.write(filling, bytes(4096))
    except BlockingIOError:
        os.close(filling)
    try:
        yield write
    finally:
        os.set_blocking(read, False)
        heard = bytearray()
        try:
            while part := os.read(read, 1 << 20):
                heard += part
        except BlockingIOError:
            pass
        os.close(read)
        os.close(write)
        assert not heard.strip(b"\0"), "the pipe was not full: nothing is shown"


@pytest.mark.parametrize("sink", [full_disk, unread_pipe])
async def test_logs_that_cannot_be_written_stop_nobody(stack: Stack, start_stack: StartStack, sink: object) -> None:
    reference = await undisturbed(stack.address, MESSAGES)
    with sink() as stderr:  # type: ignore[operator]
        muted = start_stack(stderr=stderr, step_trace=Path("/dev/full"), log_level="debug")
        load = Load(muted.address, MESSAGES, resume=True)
        await load.reach(5)
        muted.kill("executor")
        await load.reach(5)
        muted.kill("kvmanager")
        muted.kill("frontend")
        assert await load.answers() == reference
        assert muted.stop() == 0


def test_without_a_standard_error_nothing_else_takes_its_place(tmp_path: Path) -> None:
    """Whatever opens first would get descriptor 2, and every library's messages."""
    command = [*COMMAND, "kvmanager", "--state-dir", str(tmp_path / "state")]
    with subprocess.Popen(["sh", "-c", 'exec "$@" 2>&- >&- <&-', "sh", *command]) as manager:
        try:
            give_up = time.monotonic() + SECONDS
            while not (tmp_path / "state" / "kvmanager.sock").exists():
                assert manager.poll() is None and time.monotonic() < give_up
                time.sleep(0.02)
            assert [os.readlink(f"/proc/{manager.pid}/fd/{fd}") for fd in range(3)] == ["/dev/null"] * 3
        finally:
            manager.terminate()
            assert manager.wait(SECONDS) == 0


def test_no_room_for_the_converted_model(tmp_path: Path) -> None:
    with tmpfs("8m") as disk:
        command = [*COMMAND, "up", "--state-dir", str(tmp_path / "state"), "--listen", f"127.0.0.1:{free_port()}"]
        environment = {**os.environ, "XDG_CACHE_HOME": str(disk.root)}
        refused = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
        assert refused.returncode == 78
        assert "No space left on device" in refused.stderr and "Traceback" not in refused.stderr
        assert not [path for path in disk.root.rglob("*") if path.is_file() and path.stat().st_size], "a leftover"
    assert not (tmp_path / "state").exists()


def limit(pid: int, soft: int | None = None, hard: int | None = None) -> None:
    """None: as many as the other allows."""
    _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    most = hard or most
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft or most, most))


def exhaust(pid: int) -> None:
    """It keeps what it has open, and gets no descriptor more."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    limit(pid, next(number for number in range(len(used) + 1) if number not in used))


@contextmanager
def connections(address: str, count: int) -> Iterator[list[socket.socket]]:
    host, _, port = address.rpartition(":")
    with ExitStack() as held:
        yield [held.enter_context(socket.create_connection((host, int(port)), SECONDS)) for _ in range(count)]


async def test_no_descriptors_are_left(stack: Stack, start_stack: StartStack) -> None:
    """Of the frontend, then of the manager, then of the supervisor that has to start it again."""
    first = renamed([request(number, tokens=100) for number in range(3)], "poor")
    second = renamed(first, "again")
    reference = await undisturbed(stack.address, first)
    poor = start_stack()
    pids = poor.pids()

    # The next frontend gets the limit from its parent.
    limit(poor.process.pid, hard=160)
    frontend = restarted(poor, "frontend")
    load = Load(poor.address, first, resume=True)
    await load.reach(1)
    with connections(poor.address, 300):
        await load.reach(1)
        assert len(os.listdir(f"/proc/{frontend}/fd")) < 150, "clients have taken them all"
        poor.kill("executor")  # the frontend must still be able to reach the next one
        assert await load.answers() == reference
    await accepted_again(poor.address, request(80, tokens=4))

    load = Load(poor.address, second, resume=True)
    await load.reach(5)
    exhaust(pids["kvmanager"])
    assert await refusal(poor.address, request(81)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    limit(pids["kvmanager"])
    await accepted_again(poor.address, request(82, tokens=4))
    assert poor.pids()["kvmanager"] == pids["kvmanager"]

    exhaust(poor.process.pid)
    os.kill(pids["kvmanager"], signal.SIGKILL)
    while "cannot be started now" not in poor.log.read_text():
        await asyncio.sleep(0.02)
    limit(poor.process.pid)
    assert await load.answers() == reference
    check_sound(poor)
