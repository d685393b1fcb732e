"""`pagehold top` over a stack at work: its figures, and a component that dies and comes back in its place."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from tests.conftest import COMMAND, Stack
from tests.faults.streams import Load, request

pytestmark = pytest.mark.stack

PATIENCE = 60.0
Sample = dict[str, Any]


class Top:
    """`pagehold top --json` beside a stack."""

    def __init__(self, stack: Stack) -> None:
        command = [*COMMAND, "top", "--json", "--interval", "0.2", "--state-dir", str(stack.state_dir)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _next(self) -> Sample:
        assert self.process.stdout is not None
        found: Sample = json.loads(self.process.stdout.readline())
        return found

    async def until(self, is_wanted: Callable[[Sample], bool]) -> Sample:
        deadline = time.monotonic() + PATIENCE
        while not is_wanted(found := await asyncio.to_thread(self._next)):
            assert time.monotonic() < deadline, found
        return found

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=PATIENCE)
        assert (self.process.returncode, said) == (130, "")


@contextmanager
def unsupervised(stack: Stack) -> Iterator[None]:
    """Meanwhile what dies stays dead."""
    stack.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        stack.process.send_signal(signal.SIGCONT)


def is_at_work(found: Sample) -> bool:
    """On all four streams."""
    generating = (found["tokens"]["generated_per_second"] or 0) > 0
    return generating and found["sequences"]["running"] == found["streams"]["open"] == 4


def cancel(stack: Stack, messages: list[api.GenerateRequest]) -> None:
    with grpc.insecure_channel(stack.address) as channel:
        for message in messages:
            api_grpc.InferenceServiceStub(channel).Cancel(api.CancelRequest(request_id=message.request_id))


def row(stack: Stack, name: str) -> str:
    command = [*COMMAND, "top", "--once", "--interval", "0.1", "--state-dir", str(stack.state_dir)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    return next(line for line in shown.splitlines() if line.startswith(f"{name} "))


@pytest.mark.parametrize("component", ["executor", "kvmanager", "frontend"])
async def test_what_dies_keeps_its_place_and_comes_back(start_stack: Callable[..., Stack], component: str) -> None:
    stack = start_stack()
    # Longer than any machine takes for what follows.
    messages = [request(number, tokens=1900) for number in range(4)]
    load = asyncio.create_task(Load(stack.address, messages, resume=True).answers())
    top = Top(stack)
    try:
        at_work = await top.until(is_at_work)
        assert {one["state"] for one in at_work["components"].values()} == {"ready"}
        assert {name: one["pid"] for name, one in at_work["components"].items()} == stack.pids()
        assert {one["restarts"] for one in at_work["components"].values()} == {0}
        assert at_work["sequences"]["running"] == len(at_work["outputs"]) == at_work["streams"]["open"] == 4
        assert at_work["pages"]["total"] == stack.status()["pool"]["pages"]
        assert at_work["pages"]["used"] >= 4 and at_work["epoch"] == 1
        steps = at_work["steps"]
        assert 0 < steps["sequences"] <= 4 and steps["seconds"] > 0 and steps["tokens"] >= steps["sequences"]
        assert any(one["tokens_per_second"] > 0 for one in at_work["outputs"])

        with unsupervised(stack):
            pid = at_work["components"][component]["pid"]
            os.kill(pid, signal.SIGKILL)
            dead = await top.until(lambda one: one["components"][component]["pid"] is None)
            gone = dead["components"].pop(component)
            assert gone["state"] == "down" and gone["gone_seconds"] > 0 and gone["restarts"] == 0
            assert all(one["pid"] for one in dead["components"].values())
            assert {one["request_id"] for one in dead["outputs"]} == {f"request-{number}" for number in range(4)}
            part = {"executor": "sequences", "kvmanager": "prefix_hits", "frontend": "streams"}[component]
            assert set(dead[part].values()) == {None}
            assert dead["pages"]["total"] == at_work["pages"]["total"]
            assert row(stack, component).split()[1:3] == ["down", "-"]

        back = await top.until(lambda one: one["components"][component]["state"] == "ready" and is_at_work(one))
        assert back["components"][component]["pid"] not in (None, pid)
        assert back["components"][component]["restarts"] == 1
        assert row(stack, component).split()[1] == "ready"
        cancel(stack, messages)
        await load
        idle = await top.until(lambda one: not one["outputs"] and one["streams"]["open"] == 0)
        assert idle["pages"]["used"] == 0 and idle["epoch"] == (2 if component == "executor" else 1)
    finally:
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
        top.end()
