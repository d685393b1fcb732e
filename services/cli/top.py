"""`pagehold top`: what runs here and what it does, live. It reads and asks, and changes nothing.

a terminal          one window, drawn anew after each interval, until q or Ctrl-C
--count, --once,    one frame under the other
or no terminal
--json              one object a line
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable

from pagehold.runtime.settings import TopSettings
from pagehold.runtime.statedir import StateDir
from services.cli.view.frame import Line, frame
from services.cli.view.reading import Reader, Reading
from services.cli.view.sample import Sample, compare
from services.cli.view.screen import Ended, Screen, Waiting, window


def main(settings: TopSettings) -> int:
    """Returns the exit code: 0 at the end and for q, else 128 + the signal that ended it."""
    live = sys.stdout.isatty() and not settings.json_ and settings.frames is None
    with Reader(StateDir(settings.state_dir)) as reader:
        try:
            if live:
                _view(settings, reader)
            else:
                _print(settings, reader)
        except Ended as end:
            return end.code
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # Whoever read has gone; nothing more may be written there at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
    return 0


class _Watch:
    """One sample after another."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._before: Reading | None = None
        self._seen: dict[str, int] = {}

    def take(self) -> Sample:
        reading = self._reader.read()
        self._seen |= {one.name: reading.at_ns for one in reading.components if not one.is_down}
        sample = compare(self._before, reading, self._seen)
        self._before = reading
        return sample


def _view(settings: TopSettings, reader: Reader) -> None:
    """Until Ended is raised."""
    watch = _Watch(reader)
    sample = watch.take()

    def draw(width: int, height: int) -> list[Line]:
        return frame(sample, str(settings.state_dir), width, height)

    with Screen(draw) as screen:
        due = time.monotonic()
        while True:
            screen.show()
            due = _next(due, settings.interval)
            screen.wait(due)
            sample = watch.take()


def _print(settings: TopSettings, reader: Reader) -> None:
    """Each frame is about one interval, so the first comes after one."""
    show = _json_line if settings.json_ else _plain(settings)
    watch = _Watch(reader)
    with Waiting() as waiting:
        due, left = time.monotonic(), settings.frames
        watch.take()
        while left is None or left > 0:
            due = _next(due, settings.interval)
            waiting.wait(due)
            print(show(watch.take()), flush=True)
            left = left and left - 1


def _next(due: float, interval: float) -> float:
    """When the next frame is due: what was late is not caught up with."""
    return max(due + interval, time.monotonic())


def _json_line(sample: Sample) -> str:
    return json.dumps(sample.to_json())


def _plain(settings: TopSettings) -> Callable[[Sample], str]:
    width = window()[0] if sys.stdout.isatty() else None
    return lambda sample: "".join(f"{line.text}\n" for line in frame(sample, str(settings.state_dir), width))
