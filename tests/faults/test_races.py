"""Processes and clients that race each other: exactly one wins, and every stream is as if it had been alone."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from kvmanager.keys import request_key
from kvmanager.layout import Header
from pagehold.runtime.lock import read_id
from pagehold.runtime.statedir import StateDir
from pagehold.v1 import inference_pb2 as api
from services.cli.await_ready import await_ready
from tests.conftest import COMMAND, START_SECONDS, free_port
from tests.faults.orders import ORDERS, round_of
from tests.faults.seen import map_tables
from tests.faults.streams import Answer, Heard, Load, generate, mixed, request, undisturbed
from tests.faults.test_kill import StartStack

pytestmark = pytest.mark.stack

SECONDS = 60.0  # far longer than anything here takes
EXECUTORS = 3
ROUNDS = 6


async def until(found: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + SECONDS
    while not found():
        assert time.monotonic() < give_up, what
        await asyncio.sleep(0.02)


@contextmanager
def started(component: str, state: StateDir, *flags: str, count: int = 1) -> Iterator[list[subprocess.Popen[str]]]:
    """Bare processes, all at once. What they say goes to `<component>.log` beside the state folder."""
    log = state.root.with_name(f"{component}.log")
    with log.open("a") as errors:
        command = [*COMMAND, component, "--state-dir", str(state.root), *flags]
        processes = [subprocess.Popen(command, stderr=errors, text=True) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture
def folder() -> Iterator[StateDir]:
    with tempfile.TemporaryDirectory(prefix="pagehold-test-", dir="/dev/shm") as root:
        yield StateDir.prepare(Path(root) / "state")


def duplicate(name: str, tokens: int) -> api.GenerateRequest:
    message = request(0, tokens)
    message.request_id = name
    return message


async def outcome(address: str, message: api.GenerateRequest) -> Answer | grpc.StatusCode:
    try:
        return (await generate(address, message, heard=Heard.of(message))).answer
    except grpc.aio.AioRpcError as error:
        return error.code()


async def test_one_id_submitted_at_two_frontends(start_stack: StartStack) -> None:
    stack = start_stack()
    state = StateDir(stack.state_dir)
    chance = random.Random(7)
    second = f"127.0.0.1:{free_port()}"
    answers = {
        tokens: (await undisturbed(stack.address, [duplicate(f"of-{tokens}", tokens)]))[0] for tokens in (24, 25)
    }
    with started("frontend", state, "--instance", "2", "--listen", second) as (process,):
        assert await_ready(second, process.pid, START_SECONDS)
        for number in range(ROUNDS):
            name = f"twice-{number}"
            lengths = (24, 24) if number % 2 else chance.choice([(24, 25), (25, 24)])
            both = [
                asyncio.create_task(outcome(address, duplicate(name, tokens)))
                for address, tokens in zip((stack.address, second), lengths, strict=True)
            ]
            if number % 6 >= 4:
                await asyncio.sleep(chance.random() * 0.1)
                stack.kill("executor" if number % 2 else "kvmanager")
            found = await asyncio.gather(*both)
            whole = [answer for answer in found if isinstance(answer, Answer)]
            others = [code for code in found if not isinstance(code, Answer)]
            assert whole and all(answer in answers.values() for answer in whole), found
            loses = grpc.StatusCode.ABORTED if lengths[0] == lengths[1] else grpc.StatusCode.ALREADY_EXISTS
            assert all(code is loses for code in others), found
            if lengths[0] != lengths[1]:
                assert len(others) == 1, "two bodies under one id"
            assert (state.records / f"{request_key('default', name)}.req").exists()
        records = [path.stem for path in state.records.glob("*.req")]
        assert len(records) == ROUNDS + len(answers), "a record more than there were ids"


def writers(processes: list[subprocess.Popen[str]], state: StateDir) -> list[subprocess.Popen[str]]:
    """Those that have the pool mapped for writing."""
    found = []
    for process in processes:
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        except OSError:
            continue
        if any(line.endswith(str(state.pool)) and " rw" in line for line in maps):
            found.append(process)
    return found


async def test_executors_race_to_attach(folder: StateDir) -> None:
    """One of five works, then the next one; never two, and each is an epoch of its own."""
    listen = f"127.0.0.1:{free_port()}"
    flags = ("--kv-memory", "512MiB")
    with (
        started("kvmanager", folder),
        started("frontend", folder, "--listen", listen) as (frontend,),
        started("executor", folder, *flags, count=EXECUTORS) as executors,
    ):
        assert await_ready(listen, frontend.pid, START_SECONDS)
        messages = mixed(2, tokens=120)
        reference = await undisturbed(listen, messages)
        tables = map_tables(folder)
        load = Load(listen, messages)
        for epoch in range(1, EXECUTORS + 1):
            await until(lambda want=epoch: int(tables.header[Header.EPOCH]) == want, "nobody has taken over")  # type: ignore[misc]
            await until(lambda: len(writers(executors, folder)) == 1, "not exactly one has the pool")
            (working,) = writers(executors, folder)
            named = tables.header[Header.EXECUTOR_ID : Header.EXECUTOR_ID + 2].tobytes()
            assert named == read_id(folder.executor_lock)
            await load.reach(10)
            assert writers(executors, folder) == [working] and int(tables.header[Header.EPOCH]) == epoch
            if epoch < EXECUTORS:
                os.kill(working.pid, signal.SIGKILL)
                working.wait()
        assert await load.answers() == reference
        assert all(len(heard.notices) == EXECUTORS - 1 for heard in load.heard)


async def test_managers_race_to_serve(folder: StateDir) -> None:
    for _ in range(3):
        with started("kvmanager", folder, count=2) as managers:
            await until(lambda: any(one.poll() is not None for one in managers), "both serve")
            (refused,) = [one for one in managers if one.poll() is not None]
            assert refused.returncode == 1
            await until(folder.kvmanager_socket.exists, "none serves")
            (serving,) = [one for one in managers if one is not refused]
            assert serving.poll() is None
    said = folder.root.with_name("kvmanager.log").read_text()
    assert said.count("another kvmanager serves") == 3 and "Traceback" not in said


@pytest.mark.parametrize("seed", [11])
async def test_everything_dies_in_a_random_order(start_stack: StartStack, seed: int) -> None:
    chance = random.Random(seed)
    await round_of(start_stack(), chance, chance.choice(ORDERS), 0)
