"""The machine's wall clock is set a day forward and a day back while streams run: no time of Pagehold's is of it.

The clock itself is left alone: a preloaded library shows all components another time than it is.
"""

from __future__ import annotations

import asyncio
import mmap
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest

from pagehold.runtime.statedir import StateDir
from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from tests.conftest import Stack
from tests.faults.streams import Heard, Load, mixed, renamed, request, undisturbed
from tests.faults.test_kill import StartStack

pytestmark = pytest.mark.stack

DAY = 24 * 60 * 60


class WallClock:
    """As the processes that were started with `environment` see it."""

    def __init__(self, folder: Path) -> None:
        library, offset = folder / "wallclock.so", folder / "offset"
        source = Path(__file__).with_name("wallclock.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
        offset.write_bytes(bytes(8))
        with offset.open("r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), 8)).cast("q")
        self.environment = {"LD_PRELOAD": str(library), "WALL_CLOCK_OFFSET": str(offset)}

    def step(self, seconds: int) -> None:
        self._words[0] += seconds


async def resume(address: str, message: api.GenerateRequest) -> Heard:
    heard = Heard.of(message)
    async with grpc.aio.insecure_channel(address) as channel:
        async for response in api_grpc.InferenceServiceStub(channel).Resume(
            api.ResumeRequest(request_id=message.request_id)
        ):
            heard.take(response)
    return heard


async def detached(address: str, message: api.GenerateRequest) -> None:
    """A request whose client has gone away, and that goes on for a while."""
    async with grpc.aio.insecure_channel(address) as channel:
        stream = api_grpc.InferenceServiceStub(channel).Generate(message, timeout=120)
        await stream.read()
        stream.cancel()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is here, and the clock must not be set")
async def test_the_wall_clock_is_set(stack: Stack, start_stack: StartStack, tmp_path: Path) -> None:
    messages = mixed(3, tokens=96)
    left = request(9, tokens=96)
    left.response.detach_grace.seconds = 60
    *messages, left = renamed([*messages, left], "clock")
    *reference, unread = await undisturbed(stack.address, [*messages, left])

    clock = WallClock(tmp_path)
    stepped = start_stack(clock.environment, record_ttl=300)
    before = stepped.pids()
    await detached(stepped.address, left)
    load = Load(stepped.address, messages, seconds=120)
    for seconds in (DAY, -DAY, -DAY, DAY):
        await load.reach(8)
        clock.step(seconds)
        await asyncio.sleep(0.3)
    clock.step(-DAY)
    assert await load.answers() == reference
    # Grace, deadline and record are all still there, and components were neither taken for hung nor restarted.
    assert (await resume(stepped.address, left)).answer == unread
    for seconds in (2 * DAY, DAY):
        clock.step(seconds)
        await asyncio.sleep(1.3)  # records are looked through every second: first they are seen to have ended
    assert (await resume(stepped.address, messages[0])).answer == reference[0]
    assert len(list(StateDir(stepped.state_dir).records.glob("*.req"))) == len(messages) + 1
    assert stepped.pids() == before
    assert "again_in" not in stepped.log.read_text()
    # What dies while the clock is wrong comes back as well.
    load = Load(stepped.address, [request(20, tokens=48)], resume=True, seconds=120)
    await load.reach(8)
    for component in ("executor", "kvmanager"):
        stepped.kill(component)
    clock.step(-3 * DAY)
    assert len((await load.answers())[0].tokens) == 48
