"""`pagehold up` and `pagehold run`: clear refusals, hangs, drain, and nothing that outlives them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pagehold.client import Client, make_request
from tests.conftest import COMMAND, Stack, free_port
from tests.faults.streams import Load, request, undisturbed

pytestmark = pytest.mark.stack

StartStack = Callable[..., Stack]


def _refused(*words: str) -> str:
    """Runs a command that must end by itself with code 78; returns its last line."""
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 78, done.stderr
    assert "Traceback" not in done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("pagehold"))


def test_a_second_up_on_the_same_folder_is_refused(stack: Stack) -> None:
    said = _refused("up", "--state-dir", str(stack.state_dir), "--listen", f"127.0.0.1:{free_port()}")
    assert "another `pagehold up` runs on" in said
    assert all(stack.pids().values())


def test_discard_is_refused_while_components_live(stack: Stack) -> None:
    said = _refused("run", "kvmanager", "--discard", "--state-dir", str(stack.state_dir))
    assert "stop it before --discard" in said


def test_components_are_groups_within_the_supervisors_session(stack: Stack) -> None:
    """A terminal's Ctrl-C is not for them, and where sessions share the processors, nice values count among them."""
    for pid in stack.pids().values():
        assert os.getpgid(pid) == pid
        assert os.getsid(pid) == os.getsid(stack.process.pid)


def test_a_wrong_setup_ends_up_with_one_clear_line(tmp_path: Path) -> None:
    state = tmp_path / "state"
    said = _refused("up", "--state-dir", str(state), "--model", "/nowhere", "--listen", f"127.0.0.1:{free_port()}")
    assert "no model at /nowhere" in said
    assert not state.exists()


async def test_a_hung_step_is_found_and_replaced(start_stack: StartStack) -> None:
    messages = [request(number, tokens=40) for number in range(2)]
    quiet = start_stack()
    reference = await undisturbed(quiet.address, messages)
    quiet.stop()
    # The step stands still for ever with its deadline set, in every life at the 30th step.
    stack = start_stack(environment={"PAGEHOLD_FAILPOINTS": "executor.run.before=stop@30"})
    assert await Load(stack.address, messages).answers() == reference
    assert "component hangs" in stack.log.read_text()


async def test_sigterm_drains_open_streams(start_stack: StartStack) -> None:
    stack = start_stack()
    load = Load(stack.address, [request(0, tokens=120)])
    await load.reach(5)
    stack.process.terminate()
    (answer,) = await load.answers()
    assert len(answer[0]) == 120
    assert stack.stop() == 0


def test_no_component_outlives_its_supervisor(start_stack: StartStack) -> None:
    stack = start_stack()
    pids = [pid for pid in stack.pids().values() if pid]
    assert len(pids) == 3
    stack.process.kill()
    stack.process.wait()
    deadline = time.monotonic() + 5
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    # What the dead one left is adopted by the next one on the same folder.
    state, listen = str(stack.state_dir), stack.address
    again = subprocess.Popen([*COMMAND, "up", "--state-dir", state, "--listen", listen, "--kv-memory", "512MiB"])
    stack.process = again
    deadline = time.monotonic() + 60
    while stack.status()["components"]["frontend"]["state"] != "ready" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert stack.status()["components"]["executor"]["epoch"] == 2


def test_each_component_under_a_supervisor_of_its_own(tmp_path: Path) -> None:
    state, listen = tmp_path / "state", f"127.0.0.1:{free_port()}"
    flags = {"kvmanager": [], "executor": ["--kv-memory", "256MiB"], "frontend": ["--listen", listen]}
    running = [
        subprocess.Popen([*COMMAND, "run", name, "--state-dir", str(state), "--log-level", "warning", *words])
        for name, words in flags.items()
    ]
    try:
        from services.cli.await_ready import await_ready

        assert await_ready(listen, seconds=60)
        command = [*COMMAND, "generate", "--address", listen, "--temperature", "0", "--max-tokens", "8", "Say hello."]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
        assert done.stdout.strip()
    finally:
        for one in running:
            one.send_signal(signal.SIGTERM)
        assert [one.wait(40) for one in running] == [0, 0, 0]
    assert (state / "tables").exists()  # components leave shared state to whoever comes next


async def test_the_client_cancels_what_nobody_reads(stack: Stack) -> None:
    asked = make_request("Once upon a time", max_tokens=2000, ignore_eos=True, request_id="left-alone")
    async with Client(stack.address) as client:
        events = client.generate(asked)
        async for response in events:
            if response.WhichOneof("event") == "tokens":
                break
        await events.aclose()
        deadline = time.monotonic() + 10
        while any(one["request_id"] == "left-alone" for one in stack.status()["sequences"]):
            assert time.monotonic() < deadline
    assert os.path.exists(stack.state_dir)
