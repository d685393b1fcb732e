"""The operators' commands on real processes: a stack under load, one that was killed, and one that was damaged then."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmanager import pool as pools
from kvmanager.layout import RowState
from kvmanager.vacant import ALL
from pagehold.runtime.lock import is_held
from pagehold.runtime.statedir import StateDir
from services.cli.await_ready import await_ready
from tests.conftest import COMMAND, Stack
from tests.faults.streams import Load, request, undisturbed

pytestmark = pytest.mark.stack

StartStack = Callable[..., Stack]


def run(*words: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def fsck(state_dir: Path, *flags: str, code: int = 0) -> dict[str, Any]:
    done = run("fsck", "--json", *flags, "--state-dir", state_dir)
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def kill_all(stack: Stack) -> None:
    """kill -9 of the supervisor, with which all components die."""
    stack.process.kill()
    stack.process.wait()
    state, deadline = StateDir(stack.state_dir), time.monotonic() + 10
    while any(is_held(holder.lock(state)) for holder in ALL):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start_again(stack: Stack) -> None:
    words = ["--state-dir", str(stack.state_dir), "--listen", stack.address, "--kv-memory", "512MiB"]
    with stack.log.open("a") as log:
        stack.process = subprocess.Popen([*COMMAND, "up", *words], stdout=log, stderr=log)
    assert await_ready(stack.address, stack.process.pid, 60)


async def test_a_stack_under_load_is_clean(start_stack: StartStack) -> None:
    stack = start_stack()
    load = Load(stack.address, [request(number, tokens=60) for number in range(6)])
    await load.reach(3)
    for _ in range(3):
        found = fsck(stack.state_dir)
        assert (found["live"], found["total"], found["records"]) == (True, 0, 6)
        assert found["pages"] == stack.status()["pool"]["pages"]
    refused = run("fsck", "--repair", "--state-dir", stack.state_dir)
    assert refused.returncode == 78 and "still uses" in refused.stderr
    listed = json.loads(run("pools", "--json", stack.state_dir).stdout)
    assert listed[0]["live"] and listed[0]["manager_pid"] == stack.pids()["kvmanager"]
    kept = run("pools", "--reclaim", "--force", stack.state_dir)
    assert "it is live" in kept.stdout
    assert all(len(answer[0]) == 60 for answer in await load.answers())
    assert fsck(stack.state_dir)["total"] == 0


async def test_killed_and_damaged_it_is_repaired_and_goes_on_with_the_same_tokens(start_stack: StartStack) -> None:
    messages = [request(number, tokens=80) for number in range(4)]
    quiet = start_stack()
    reference = await undisturbed(quiet.address, messages)
    quiet.stop()
    stack = start_stack()
    load = Load(stack.address, messages, resume=True)
    await load.reach(8)
    kill_all(stack)
    clean = fsck(stack.state_dir)
    assert (clean["live"], clean["total"], clean["records"], clean["rows"]) == (False, 0, 4, 4)
    (listed,) = json.loads(run("pools", "--json", stack.state_dir).stdout)
    assert (listed["live"], listed["records"], listed["unfinished"]) == (False, 4, 4)
    assert "--force drops them" in run("pools", "--reclaim", stack.state_dir).stdout
    pool = pools.examine(StateDir(stack.state_dir), writable=True)
    assert pool is not None
    live = np.flatnonzero(pool.tables.row_word & np.uint64(0xFF) == RowState.LIVE)
    pool.tables.row_entry[live[0], 0] += 1 << 32
    pool.tables.row_entry[live[1], 1] = pool.tables.row_entry[live[2], 1]
    assert fsck(stack.state_dir, code=1)["total"] >= 2
    repaired = fsck(stack.state_dir, "--repair")
    assert repaired["total"] == 0 and len(repaired["repaired"]) >= 2
    assert fsck(stack.state_dir)["rows"] < 4
    start_again(stack)
    assert await load.answers() == reference
    assert fsck(stack.state_dir)["total"] == 0


async def test_a_dead_folder_is_reclaimed(start_stack: StartStack) -> None:
    stack = start_stack()
    load = Load(stack.address, [request(0, tokens=8)])
    await load.answers()
    kill_all(stack)
    done = run("pools", "--reclaim", "--json", stack.state_dir)
    assert json.loads(done.stdout)["reclaimed"] > 1 << 20
    assert not stack.state_dir.exists()
    start_again(stack)  # what is not there is no obstacle


async def test_a_prefix_is_pinned_listed_and_unpinned(start_stack: StartStack) -> None:
    stack = start_stack()
    text = "You are a careful assistant who always answers in complete sentences. " * 3
    where = ("--state-dir", stack.state_dir)
    done = run("prefix", "pin", "rules", "--text", text, "--address", stack.address)
    assert done.returncode == 0 and "pinned rules" in done.stdout
    (pin,) = json.loads(run("prefix", "list", "--json", *where).stdout)
    assert (pin["name"], pin["tenant"], pin["tokens"]) == ("rules", "default", pin["pages"] * 16)
    assert stack.status()["pool"]["pinned"] == pin["pages"] > 0
    stack.kill("kvmanager")
    assert json.loads(run("prefix", "list", "--json", *where).stdout) == [pin]
    assert fsck(stack.state_dir)["total"] == 0
    assert run("prefix", "unpin", "rules", *where).returncode == 0
    assert stack.status()["pool"]["pinned"] == 0
    again = run("prefix", "unpin", "rules", *where)
    assert again.returncode == 1 and "has pinned no prefix rules" in again.stderr
    short = run("prefix", "pin", "tiny", "--text", "Hi", "--address", stack.address)
    assert short.returncode == 1 and "whole pages of 16 tokens" in short.stderr
    assert json.loads(run("prefix", "list", "--json", *where).stdout) == []
