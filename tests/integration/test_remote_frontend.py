"""A frontend on another machine, as far as one machine can tell: a state folder of its own, and the executor by TCP."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from pagehold.admin.v1 import admin_pb2 as admin
from pagehold.admin.v1 import admin_pb2_grpc as admin_grpc
from services.cli.await_ready import await_ready
from tests.conftest import COMMAND, START_SECONDS, Stack, free_port
from tests.faults.streams import Load, request, undisturbed

pytestmark = pytest.mark.stack

StartStack = Callable[..., Stack]


async def test_streams_go_through_a_frontend_elsewhere_while_executors_die(
    start_stack: StartStack, tmp_path: Path
) -> None:
    messages = [request(number, tokens=300) for number in range(2)]
    executor = f"127.0.0.1:{free_port()}"
    stack = start_stack(executor_listen=executor)
    reference = await undisturbed(stack.address, messages)
    address = f"127.0.0.1:{free_port()}"
    words = ["frontend", "--state-dir", str(tmp_path / "state"), "--listen", address, "--executor", executor]
    frontend = subprocess.Popen([*COMMAND, *words, "--drain-grace", "0"])
    try:
        assert await_ready(address, frontend.pid, START_SECONDS)
        for number, message in enumerate(messages):
            message.request_id = f"through-{number}"
        load = Load(address, messages)
        await load.reach(5)
        stack.kill("executor")
        await load.reach(30)
        stack.kill("executor")
        assert await load.answers() == reference
    finally:
        frontend.terminate()
        frontend.wait(30)


async def test_a_port_is_no_way_to_arm_faults(start_stack: StartStack) -> None:
    executor = f"127.0.0.1:{free_port()}"
    start_stack(executor_listen=executor)
    async with grpc.aio.insecure_channel(executor) as channel:
        stub = admin_grpc.AdminServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ArmFailpoints(admin.ArmFailpointsRequest(specification=""))
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_port_that_is_taken_ends_up_with_one_clear_line(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = f"127.0.0.1:{holder.getsockname()[1]}"
        words = ["up", "--state-dir", str(tmp_path / "state"), "--listen", f"127.0.0.1:{free_port()}"]
        words += ["--executor-listen", taken, "--kv-memory", "512MiB"]
        done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 78
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("pagehold executor")]
    assert said == [
        f"pagehold executor: cannot listen on {taken}: in use or not allowed; choose another --executor-listen"
    ]
