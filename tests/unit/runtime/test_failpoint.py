"""Failpoints: what can be armed, and what a hit does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pagehold.runtime import failpoint


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
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
    code = "from pagehold.runtime import failpoint as f; f.arm('a=kill'); f.hit('a')"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("wrong", ["a", "a=", "a=explode", "a=kill@x", "a=delay:soon", "ok=kill;b"])
def test_what_cannot_be_read_changes_nothing_and_is_named(wrong: str) -> None:
    failpoint.arm("before=error")
    with pytest.raises(failpoint.FailpointSyntaxError, match="want NAME=kill"):
        failpoint.arm(wrong)
    with pytest.raises(failpoint.FailpointError):
        failpoint.hit("before")
