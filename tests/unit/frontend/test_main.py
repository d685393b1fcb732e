"""The frontend as a process: ready when an executor is, and gone without harm when it is told to go."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from tests.conftest import COMMAND, free_port
from tests.unit.frontend.world import FakeExecutor, step

pytestmark = pytest.mark.stack

INFERENCE = "pagehold.v1.InferenceService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Frontend:
    """The process, its channel, and the executor in front of which it stands."""

    def __init__(self, folder: Path, executor: FakeExecutor, flags: tuple[str, ...]) -> None:
        address = f"127.0.0.1:{free_port()}"
        words = ["frontend", "--state-dir", str(folder / "state"), "--listen", address]
        self.process = subprocess.Popen([*COMMAND, *words, "--executor", executor.address, *flags])
        self.executor = executor
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.initial_reconnect_backoff_ms", 50)])
        self.stub: Any = api_grpc.InferenceServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)

    async def status(self, name: str) -> int:
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service=name), wait_for_ready=True)
        return int(answer.status)

    async def until(self, status: int) -> None:
        async with asyncio.timeout(10):
            while await self.status(INFERENCE) != status:
                await asyncio.sleep(0.02)

    async def begun(self) -> tuple[Any, ex.Submit]:
        """A stream that has its first token."""
        call = self.stub.Generate(api.GenerateRequest(request_id="one", text="ab"))
        submit = await self.executor.accept()
        self.executor.say(tokens=step(submit.stream_id, 0, [70]))
        assert (await call.read()).HasField("accepted")
        assert (await call.read()).tokens.token_ids == [70]
        return call, submit

    async def exit_code(self) -> int:
        return await asyncio.to_thread(self.process.wait, 10)


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., Frontend]]:
    executor = FakeExecutor(tmp_path)
    started: list[Frontend] = []

    def make(*flags: str) -> Frontend:
        started.append(Frontend(tmp_path, executor, flags))
        return started[-1]

    yield make
    for frontend in started:
        await frontend.channel.close()
        frontend.process.kill()
        frontend.process.wait()
    await executor.stop()


async def test_readiness_follows_the_executor(start: Callable[..., Frontend]) -> None:
    frontend = start()
    assert await frontend.status("") == SERVING, "the process lives"
    for service in (INFERENCE, "pagehold.v1.ModelService"):
        assert await frontend.status(service) == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError, match="no executor is ready yet"):
        await frontend.stub.Tokenize(api.TokenizeRequest(text="a"))

    watch = frontend.health.Watch(health_pb2.HealthCheckRequest(service=INFERENCE))
    assert (await watch.read()).status == NOT_SERVING
    await frontend.executor.start()
    assert (await asyncio.wait_for(watch.read(), 5)).status == SERVING
    assert (await frontend.stub.Tokenize(api.TokenizeRequest(text="ab"))).ids

    # A short gap is nobody's business; a long one is.
    await frontend.executor.restart()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(pending := asyncio.ensure_future(watch.read())), 0.5)
    await frontend.executor.stop()
    assert (await asyncio.wait_for(pending, 5)).status == NOT_SERVING


async def calling_on(frontend: Frontend) -> None:
    """For as long as it is answered."""
    while True:
        await frontend.stub.Tokenize(api.TokenizeRequest(text="ab"))


async def test_open_streams_get_their_time(start: Callable[..., Frontend]) -> None:
    frontend = start("--drain-delay", "0.3")
    await frontend.executor.start()
    await frontend.until(SERVING)
    call, submit = await frontend.begun()
    watch = frontend.health.Watch(health_pb2.HealthCheckRequest(service=INFERENCE))
    assert (await watch.read()).status == SERVING
    frontend.process.terminate()
    assert (await watch.read()).status == NOT_SERVING
    # For as long as balancers need to see that, new calls are served; then there is nobody to connect to.
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await calling_on(frontend)
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    ended = ex.Ended(stream_id=submit.stream_id, reason=ex.END_REASON_LENGTH, length=2)
    frontend.executor.say(tokens=step(submit.stream_id, 1, [71]), ended=[ended])
    assert (await call.read()).tokens.token_ids == [71]
    assert (await call.read()).finished.usage.completion_tokens == 2
    assert await call.read() is grpc.aio.EOF
    assert await frontend.exit_code() == 0


async def test_what_is_left_is_told_to_go_on_elsewhere(start: Callable[..., Frontend]) -> None:
    frontend = start("--drain-grace", "0.2")
    await frontend.executor.start()
    await frontend.until(SERVING)
    call, submit = await frontend.begun()
    frontend.process.terminate()
    with pytest.raises(grpc.aio.AioRpcError, match="Resume at another") as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (await frontend.executor.hear("detach")) == ex.Detach(stream_id=submit.stream_id, grace_ms=30_000)
    assert await frontend.exit_code() == 0


async def test_a_fault_between_executor_and_streams_is_like_a_death(start: Callable[..., Frontend]) -> None:
    frontend = start("--failpoints", "frontend.received.before=error@3", "--drain-grace", "60")
    await frontend.executor.start()
    await frontend.until(SERVING)
    call, submit = await frontend.begun()
    frontend.executor.say(tokens=step(submit.stream_id, 1, [71]))
    with pytest.raises(grpc.aio.AioRpcError, match="Resume at another") as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert await frontend.exit_code() == 1
