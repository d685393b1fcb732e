"""`pagehold top` over files, and in a terminal, which it leaves as it was."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmanager.service import Manager
from pagehold.runtime.progress import Progress, State
from pagehold.runtime.statedir import StateDir
from services.cli.view.screen import Ended, Waiting
from tests.conftest import COMMAND
from tests.unit.cli.command import Command

PATIENCE = 60.0
_LOCAL_MODES = 3  # of what tcgetattr returns


class Terminal:
    """A terminal in which `pagehold top` runs."""

    def __init__(self, *words: object, width: int = 100, height: int = 30) -> None:
        self.near, self.far = pty.openpty()
        self.resize(width, height)
        self.modes = termios.tcgetattr(self.far)
        self.text = ""
        command = [*COMMAND, "top", *map(str, words)]
        # Of a session of its own: the terminal is the one whose keys become its signals.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _IN_SESSION, *command], stdin=self.far, stdout=self.far, stderr=self.far
        )

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.near, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.near, keys)

    def until(self, wanted: str) -> str:
        """What was written up to the first of it, that and all before left out from then on."""
        deadline = time.monotonic() + PATIENCE
        while wanted not in self.text:
            assert time.monotonic() < deadline, f"no {wanted!r} in {self.text!r}"
            assert self._hear(), f"it ended without {wanted!r}: {self.text!r}"
        before, _, self.text = self.text.partition(wanted)
        return before

    def _hear(self) -> bool:
        if select.select([self.near], [], [], 0.05)[0]:
            self.text += os.read(self.near, 1 << 16).decode()
            return True
        return self.process.poll() is None

    def end(self) -> int:
        """The exit code, once it has ended."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            self._hear()
        while select.select([self.near], [], [], 0)[0]:
            self._hear()
        return self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.near)
        os.close(self.far)


_IN_SESSION = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def terminal(state: StateDir, manager: Manager) -> Iterator[Terminal]:
    """Over a request that waits, and a kvmanager and an executor that do not answer."""
    Progress(state.progress("kvmanager")).set_state(State.READY)
    Progress(state.progress("executor")).set_state(State.READY)
    opened = Terminal("--state-dir", state.root, "--interval", 0.2)
    yield opened
    opened.close()


@pytest.fixture
def slow(state: StateDir) -> Iterator[Terminal]:
    """With one frame an hour."""
    opened = Terminal("--state-dir", state.root, "--interval", 3600)
    yield opened
    opened.close()


def rows(drawn: str) -> list[str]:
    """A frame's lines as they are seen."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn).split("\r\n")


def test_q_ends_it_and_the_terminal_is_as_it_was(terminal: Terminal) -> None:
    assert terminal.until("\x1b[?1049h\x1b[?25l") == ""
    terminal.until("\x1b[H")
    shown = rows(terminal.until("\x1b[H"))
    assert shown[0].startswith("pagehold top  ")
    assert any(row.startswith("executor            ready") and "does not answer" in row for row in shown)
    assert shown[-1].split()[:2] == ["a", "0"] and len(shown) <= 30
    assert not termios.tcgetattr(terminal.far)[_LOCAL_MODES] & termios.ICANON, "keys come at once"
    terminal.type(b"x")
    terminal.until("\x1b[H")
    terminal.type(b"q")
    assert terminal.end() == 0
    assert terminal.text.endswith("\x1b[?25h\x1b[?1049l")
    assert termios.tcgetattr(terminal.far) == terminal.modes


def test_it_is_drawn_anew_as_the_window_becomes(slow: Terminal) -> None:
    whole = rows(slow.until("\x1b[J"))
    assert len(whole) > 8 and max(map(len, whole)) > 40
    slow.resize(40, 8)
    slow.until("\x1b[H")
    shown = rows(slow.until("\x1b[J"))
    assert len(shown) == 8 and max(map(len, shown)) == 39
    slow.resize(100, 30)
    slow.until("\x1b[H")
    assert len(rows(slow.until("\x1b[J"))) == len(whole)


@pytest.mark.parametrize(
    ("keys", "number"), [(b"\x03", signal.SIGINT), (b"", signal.SIGTERM), (b"", signal.SIGHUP)], ids=str
)
def test_a_signal_ends_it_and_the_terminal_is_as_it_was(terminal: Terminal, keys: bytes, number: int) -> None:
    terminal.until("\x1b[H")
    if keys:
        terminal.type(keys)
    else:
        terminal.process.send_signal(number)
    assert terminal.end() == 128 + number
    assert terminal.text.endswith("\x1b[?25h\x1b[?1049l") and "Traceback" not in terminal.text
    assert termios.tcgetattr(terminal.far) == terminal.modes


def test_it_can_be_ended_when_a_look_takes_longer_than_the_interval() -> None:
    """As beside processes that do not answer."""
    with Waiting() as waiting:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Ended) as end:
            waiting.wait(time.monotonic() - 1)
    assert end.value.code == 128 + signal.SIGTERM


def test_ctrl_z_gives_the_terminal_back_for_a_while(terminal: Terminal) -> None:
    terminal.until("\x1b[H")
    terminal.type(b"\x1a")
    terminal.until("\x1b[?25h\x1b[?1049l")
    _, status = os.waitpid(terminal.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert termios.tcgetattr(terminal.far) == terminal.modes
    terminal.process.send_signal(signal.SIGCONT)
    terminal.until("\x1b[?1049h\x1b[?25l\x1b[H")
    terminal.until("\x1b[H")
    terminal.type(b"q")
    assert terminal.end() == 0


def test_a_terminal_that_goes_away_ends_it(terminal: Terminal) -> None:
    terminal.until("\x1b[H")
    os.close(terminal.near)
    assert terminal.process.wait(PATIENCE) in (129, 141)
    terminal.near = os.open(os.devnull, os.O_RDONLY)


def test_frames_where_nobody_looks(pagehold: Command, state: StateDir, manager: Manager) -> None:
    assert pagehold("top", "--state-dir", state.root, "--interval", 0.1, "--count", 2) == 0
    assert pagehold.out.count("pagehold top  ") == 2 and "\x1b" not in pagehold.out
    assert "\na             0       40" in pagehold.out
    assert pagehold("top", "--state-dir", state.root, "--interval", 0.1, "--once") == 0
    assert pagehold.out.count("pagehold top  ") == 1


def test_one_object_a_line(pagehold: Command, state: StateDir, manager: Manager) -> None:
    assert pagehold("top", "--json", "--state-dir", state.root, "--interval", 0.1, "--count", 3) == 0
    found = [json.loads(line) for line in pagehold.out.splitlines()]
    assert len(found) == 3
    assert all(one["outputs"][0]["request_id"] == "a" and one["seconds"] > 0 for one in found)
    assert found[0]["components"]["kvmanager"] == {
        "kind": "kvmanager", "pid": None, "state": "down", "uptime_seconds": None, "restarts": None,
        "answer_seconds": None, "is_silent": False, "gone_seconds": None,
    }  # fmt: skip


def test_nothing_runs_here(pagehold: Command, tmp_path: Path) -> None:
    assert pagehold("top", "--state-dir", tmp_path / "none", "--interval", 0.1, "--once") == 0
    assert "nothing runs here" in pagehold.out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--once", "--count", "2"], "--once is --count 1: give one of them"),
        (["--interval", "0"], "--interval: input should be greater than or equal to 0.1"),
        (["--count", "0"], "--count: input should be greater than or equal to 1"),
    ],
)
def test_wrong_usage(words: list[str], said: str, pagehold: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        pagehold("top", *words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_it(state: StateDir) -> None:
    command = [*COMMAND, "top", "--state-dir", str(state.root), "--interval", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"pagehold top")
        process.stdout.close()
        assert process.wait(PATIENCE) == 141
        assert process.stderr.read() == b""


def test_ctrl_c_ends_it_silently_where_nobody_looks(state: StateDir) -> None:
    command = [*COMMAND, "top", "--json", "--state-dir", str(state.root), "--interval", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["components"]
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert process.stderr.read() == b""


def test_it_imports_nothing_heavy() -> None:
    code = "import sys, services.cli.main, services.cli.top; print(sorted({'numpy', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert done.stdout == "[]\n"
