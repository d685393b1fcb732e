"""The terminal of a live view: what is drawn there, and what comes from it.

shell ──enter──▶ view: another screen, no cursor, keys as they come ──leave──▶ shell, as it was
                  ▲ │ Ctrl-Z leaves, stops this process, and enters again when it goes on
                  └─┘
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Final, Self

from services.cli.view.frame import Line, Style

_ENTER: Final = "\x1b[?1049h\x1b[?25l"  # another screen, no cursor
_LEAVE: Final = "\x1b[?25h\x1b[?1049l"
_HOME: Final = "\x1b[H"
_REST_OF_LINE: Final = "\x1b[K"
_REST_OF_SCREEN: Final = "\x1b[J"
_PLAIN: Final = "\x1b[m"
_STYLES: Final = {Style.PLAIN: "", Style.TITLE: "\x1b[1m", Style.ALARM: "\x1b[1;31m"}
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(Exception):
    """Somebody ended it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code  # to exit with


class Waiting:
    """Signals as events: they end a wait, and never interrupt anything else."""

    def __init__(self, signals: Iterable[signal.Signals] = _ENDING) -> None:
        self._signals = tuple(signals)
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._near, self._far = socket.socketpair()
        self._near.setblocking(False)
        self._far.setblocking(False)
        self._former_fd = signal.set_wakeup_fd(self._far.fileno(), warn_on_full_buffer=False)
        self._former = {one: signal.signal(one, _nothing) for one in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for one, former in self._former.items():
            signal.signal(one, former)
        signal.set_wakeup_fd(self._former_fd)
        self._near.close()
        self._far.close()

    def wait(self, until: float) -> None:
        """until: CLOCK_MONOTONIC, seconds. What has come is heard also when that is over. Raises Ended."""
        while True:
            seconds = max(until - time.monotonic(), 0)
            self._hear(seconds)
            if not seconds:
                return

    def _hear(self, seconds: float) -> None:
        """What comes first, if anything does within so many seconds."""
        select.select([self._near], [], [], seconds)
        self._take()

    def _take(self) -> None:
        try:
            came = self._near.recv(256)
        except BlockingIOError:
            return
        for number in came:
            if number in _ENDING:
                raise Ended(128 + number)
            self._on(signal.Signals(number))

    def _on(self, number: signal.Signals) -> None:
        """Of another signal than those that end it."""


class Screen(Waiting):
    """Standard output as a window. Keys come from standard input where that is a terminal too."""

    def __init__(self, draw: Callable[[int, int], list[Line]]) -> None:
        """draw(width, height): the lines of now; asked for whenever the window changes as well."""
        super().__init__((*_ENDING, signal.SIGWINCH, signal.SIGTSTP))
        self._draw = draw
        self._keys: int | None = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._modes: list[Any] | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self._enter()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._leave()
        finally:
            super().__exit__()

    def _hear(self, seconds: float) -> None:
        """Draws anew when the window changes; q ends it with code 0."""
        sources: list[Any] = [self._near] if self._keys is None else [self._near, self._keys]
        ready, _, _ = select.select(sources, [], [], seconds)
        self._take()
        if self._keys in ready:
            self._press()

    def show(self) -> None:
        """Draws what is now, over what was."""
        width, height = window()
        # The last column stays empty: a cursor that cannot go on stands there on the letter, and would erase it.
        lines = self._draw(width - 1, height)
        drawn = [f"{_STYLES[style]}{text}{_PLAIN}{_REST_OF_LINE}" for text, style in lines]
        _write(_HOME + "\n".join(drawn) + _REST_OF_SCREEN)

    def _press(self) -> None:
        assert self._keys is not None
        came = os.read(self._keys, 256)
        if not came:
            self._keys = None  # the terminal is gone, or its end was typed
        elif b"q" in came.lower():
            raise Ended(0)

    def _on(self, number: signal.Signals) -> None:
        if number is signal.SIGTSTP:
            self._leave()
            os.kill(os.getpid(), signal.SIGSTOP)
            self._enter()
        self.show()

    def _enter(self) -> None:
        if self._keys is not None:
            self._modes = termios.tcgetattr(self._keys)
            tty.setcbreak(self._keys)
        _write(_ENTER)

    def _leave(self) -> None:
        try:
            if self._keys is not None and self._modes is not None:
                termios.tcsetattr(self._keys, termios.TCSADRAIN, self._modes)
            _write(_LEAVE)
        except (OSError, termios.error):
            pass  # the terminal is gone


def window() -> tuple[int, int]:
    """Width and height of standard output, a terminal. One that does not know them is taken for an ordinary one."""
    width, height = os.get_terminal_size(sys.stdout.fileno())
    return width or 80, height or 24


def _write(text: str) -> None:
    """Past Python's buffer: what a terminal that is gone did not take must not be tried again at exit."""
    left = memoryview(text.encode())
    while left:
        left = left[os.write(sys.stdout.fileno(), left) :]


def _nothing(number: int, where: FrameType | None) -> None:
    """A handler: what counts is that the number is written to the wakeup descriptor."""
