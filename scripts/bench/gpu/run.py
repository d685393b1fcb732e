"""Runs one part in a process of its own, so that what it breaks or leaks ends with it."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from typing import IO, Final

from gpu.job import REPOSITORY, Options, Part, python_path
from gpu.report import Machine, PartRun, Result, decode

_GRACE_SECONDS: Final = 5.0  # beyond the limit that a part sees itself
_LOOK_SECONDS: Final = 1.0
_LAST_LINES: Final = 8


def run(part: Part, options: Options, command: str, machine: Machine) -> PartRun:
    """Until it ends or its limit has passed; what it found until then is kept."""
    print(f"== {part.name}: {part.what}", file=sys.stderr, flush=True)
    started, began = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "gpu", part.name, "--child", str(write_end), *flags(options)],
        pass_fds=(write_end,),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": python_path(REPOSITORY / "scripts" / "bench", REPOSITORY)},
        start_new_session=True,  # its children are stopped with it
    )
    os.close(write_end)
    assert process.stderr is not None
    try:
        lines, last, stopped = _follow(process, process.stderr, read_end, began + options.limit + _GRACE_SECONDS)
        reason = _end(process, last, stopped)
    finally:  # of an interrupt, too: what a part has started must not go on
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if reason:
        print(f"  {reason}", file=sys.stderr, flush=True)
    results, notes = _sorted(lines)
    seconds = round(time.monotonic() - began, 1)
    return PartRun(part.name, command, started, machine, seconds, reason, results, notes)


def flags(options: Options) -> list[str]:
    """As words of the command line."""
    words = ["--device", options.device, "--work", str(options.work), "--limit", str(options.limit)]
    return [*words, "--fa3", str(options.fa3)] if options.fa3 else words


def _follow(
    process: subprocess.Popen[bytes], stderr: IO[bytes], results: int, deadline: float
) -> tuple[list[str], list[str], bool]:
    """What came through the pipe, the last lines of standard error, which are shown as they come, and whether
    the deadline passed. A process that a part left behind may hold standard error: it is not waited for.
    """
    last: deque[str] = deque(maxlen=_LAST_LINES)
    held = {results: b"", stderr.fileno(): b""}
    lines: list[str] = []
    with selectors.DefaultSelector() as selector:
        for fd in held:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            ready = selector.select(min(left, _LOOK_SECONDS))
            if not ready and process.poll() is not None:
                break
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fd)
                *whole, held[key.fd] = (held[key.fd] + data).split(b"\n")
                texts = [line.decode(errors="replace") for line in whole]
                if key.fd == results:
                    lines += texts
                else:
                    last.extend(text for text in texts if text.strip())
                    for text in texts:
                        print(text, file=sys.stderr, flush=True)
    os.close(results)
    return lines, list(last), time.monotonic() >= deadline


def _end(process: subprocess.Popen[bytes], last: list[str], stopped: bool) -> str:
    """Waits for the process, or ends it; why it did not come to its end."""
    if stopped:
        process.kill()
        process.wait()
        return "stopped at its limit of time"
    code = process.wait()
    if code == 0:
        return ""
    if code < 0:
        return f"ended by signal {-code}"
    message = last[-1].strip() if last else "no message"
    return message.removeprefix("gpu-check: ") if code == 3 else f"exit status {code}: {message}"


def _sorted(lines: list[str]) -> tuple[list[Result], list[str]]:
    notes = [fields["note"] for line in lines if "note" in (fields := json.loads(line))]
    return [decode(line) for line in lines if "note" not in json.loads(line)], notes
