"""The comparison of a manager apart with one in the executor's process."""

from __future__ import annotations

import asyncio
import json
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from joined_executor import JoinedLink
from manager_cost import Round, Way, commands, ratios, render
from step_times import Summary

from kvmanager.service import Manager
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.lock import FileLock
from pagehold.runtime.statedir import StateDir

MANAGER = str(Path(__file__).resolve().parents[3] / "scripts" / "bench" / "manager")
ID = b"0123456789abcdef"


def one(number: int, way: Way, step: float, outside: float) -> Round:
    return Round(number, way, Summary(10, 2, step, step, outside, 0.9, 0.0, 0.0, 0.0, 0, 0))


def test_ratios_are_of_the_same_round() -> None:
    rounds = [
        one(1, Way.APART, 1000, 110),
        one(1, Way.JOINED, 500, 100),
        one(2, Way.JOINED, 1000, 100),  # every other round runs backwards
        one(2, Way.APART, 3000, 150),
    ]
    assert ratios(rounds) == {"step": [2.0, 3.0], "outside the runner": [1.1, 1.5]}
    assert "step, apart over joined: median 2.500 of 2.000, 3.000" in render(rounds)


def test_only_one_of_them_has_a_manager(tmp_path: Path) -> None:
    apart, joined = (commands(way, tmp_path, "127.0.0.1:1", tmp_path / "t", "1GiB", None) for way in Way)
    assert [command[3] for command in apart] == ["frontend", "executor", "kvmanager"]
    assert len(joined) == 2 and joined[0] == apart[0]
    # All flags of the executor are the same.
    assert joined[1][2:] == apart[1][4:]


def attach_request() -> kv.AttachRequest:
    geometry = kv.Geometry(
        layers=1, kv_heads=1, head_dim=32, page_size=16, kv_dtype="bfloat16", layout_id=1, max_model_len=64, rows=4
    )
    return kv.AttachRequest(executor_id=ID, fingerprint="ab" * 32, geometry=geometry, pool_bytes=1 << 16)


def made(folder: Path, executor_id: bytes) -> tuple[JoinedLink, list[object]]:
    """A link, and what its callbacks were told."""
    state = StateDir.prepare(folder)
    lock = FileLock(state.executor_lock)
    lock.acquire()
    lock.write_id(executor_id)
    lock.release()
    told: list[object] = []

    async def attach() -> kv.AttachRequest:
        return attach_request()

    manager = Manager(state, quota=1 << 20, ttl=60.0, hit=lambda name: None)
    link = JoinedLink(manager, "", attach, told.append, lambda call, reply: told.append((call, reply)), told.append)
    return link, told


def test_calls_are_answered_in_the_thread_that_makes_them(tmp_path: Path) -> None:
    link, told = made(tmp_path / "state", ID)

    async def attached() -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(link.run(), 0.2)

    asyncio.run(attached())
    (answer,) = told
    assert isinstance(answer, kv.AttachResponse) and answer.epoch == 1
    record = kv.RequestRecord(tenant="t", request_id="r", digest=b"d", prompt=[1, 2, 3], max_tokens=4, outputs=1)
    call = kv.Call(open=kv.OpenRequest(record=record))
    link.send([call])
    _, answered = told
    assert isinstance(answered, tuple)
    assert answered[0] is call and answered[1].open.key


def test_a_refused_executor_is_told(tmp_path: Path) -> None:
    link, told = made(tmp_path / "state", b"another executor")
    asyncio.run(link.run())
    (error,) = told
    assert isinstance(error, kv.Error) and "another executor" in error.message


@pytest.mark.stack
def test_both_ways_stream(tmp_path: Path) -> None:
    words = ["--streams", "2", "--steps", "8", "--rounds", "1", "--kv-memory", "64MiB"]
    file = tmp_path / "figures.json"
    done = subprocess.run([MANAGER, *words, "--json", str(file)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rounds = json.loads(file.read_text())
    assert [one["way"] for one in rounds] == list(Way)
    assert all(one["summary"]["steps"] == 8 and one["summary"]["outside_us"] > 0 for one in rounds)
