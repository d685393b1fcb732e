"""Failpoints: what can be armed, and what a hit does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from pagehold.admin.v1 import admin_pb2 as admin
from pagehold.admin.v1 import admin_pb2_grpc as admin_grpc
from pagehold.runtime import failpoint
from pagehold.runtime.admin import serve_admin
from services.cli import failpoint as cli

KNOWN = failpoint.POINTS


@pytest.fixture(autouse=True)
def disarmed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(failpoint, "POINTS", dict.fromkeys(("a", "b", "ok", "before"), "two steps"))
    yield
    failpoint.arm("")


def test_off_unless_armed() -> None:
    failpoint.hit("a")
    failpoint.arm("b=error")
    failpoint.hit("a")
    with pytest.raises(failpoint.FailpointError, match="b"):
        failpoint.hit("b")
    failpoint.arm("")
    failpoint.hit("b")


def test_count_lets_the_first_hits_pass() -> None:
    failpoint.arm(" a=error@3 ; b=delay:0@2;")
    failpoint.hit("a")
    failpoint.hit("a")
    for _ in range(2):
        with pytest.raises(failpoint.FailpointError):
            failpoint.hit("a")


def test_delay() -> None:
    failpoint.arm("a=delay:30")
    started = time.monotonic()
    failpoint.hit("a")
    assert time.monotonic() - started >= 0.03


def test_kill_is_a_kill() -> None:
    code = "from pagehold.runtime import failpoint as f; n = next(iter(f.POINTS)); f.arm(n + '=kill'); f.hit(n)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("wrong", ["a", "a=", "a=explode", "a=kill@x", "a=delay:soon", "ok=kill;b"])
def test_what_cannot_be_read_changes_nothing_and_is_named(wrong: str) -> None:
    failpoint.arm("before=error")
    with pytest.raises(failpoint.FailpointSyntaxError, match="want NAME=kill"):
        failpoint.arm(wrong)
    with pytest.raises(failpoint.FailpointError):
        failpoint.hit("before")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(failpoint.FailpointSyntaxError, match="no failpoint 'nowhere'"):
        failpoint.arm("ok=error;nowhere=kill")
    failpoint.hit("ok")


def test_a_file_arms_one_life_beside_the_environment(tmp_path: Path) -> None:
    note = tmp_path / "executor.failpoints"
    failpoint.arm_once(note)
    note.write_text("a=error@2")
    failpoint.arm("b=error")
    failpoint.arm_once(note)
    assert not note.exists()
    failpoint.hit("a")
    for name in ("a", "b"):
        with pytest.raises(failpoint.FailpointError, match=f"failpoint {name}"):
            failpoint.hit(name)


def test_every_point_is_passed_somewhere_and_every_one_that_is_passed_is_known() -> None:
    root = Path(failpoint.__file__).parents[2]
    sources = [
        path.read_text() for folder in ("services", "kvmanager", "pagehold") for path in (root / folder).rglob("*.py")
    ]
    passed = {name for text in sources for name in re.findall(r"""hit\(\s*"([a-z_.]+)"\s*\)""", text)}
    assert passed == set(KNOWN)


async def test_the_admin_call_arms_over_a_unix_socket_alone(tmp_path: Path) -> None:
    server = grpc.aio.server()
    serve_admin(server)
    addresses = [f"unix:{tmp_path / 's'}", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"]
    server.add_insecure_port(addresses[0])
    await server.start()
    statuses = []
    for address in addresses:
        for specification in ("a=error", "a=explode"):
            async with grpc.aio.insecure_channel(address) as channel:
                stub: Any = admin_grpc.AdminServiceStub(channel)
                try:
                    reply = await stub.ArmFailpoints(admin.ArmFailpointsRequest(specification=specification))
                    statuses.append(reply.pid == os.getpid())
                except grpc.aio.AioRpcError as error:
                    statuses.append(error.code())
    await server.stop(0)
    refused = grpc.StatusCode.PERMISSION_DENIED
    assert statuses == [True, grpc.StatusCode.INVALID_ARGUMENT, refused, refused]
    with pytest.raises(failpoint.FailpointError):
        failpoint.hit("a")


def test_the_page_is_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    page = Path(failpoint.__file__).parents[2] / "docs" / "failpoints.md"
    assert page.read_text() == cli.markdown(), "run `pagehold failpoint list --markdown > docs/failpoints.md`"
