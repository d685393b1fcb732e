"""An engine's server as a child process: started, waited for, stopped."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from peers_lib.worker import EngineError, die_with_parent

_POLL_SECONDS: Final = 0.02
_STOP_SECONDS: Final = 45.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`started` is CLOCK_MONOTONIC. What it writes goes into `log`."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        """The command's first word must be its file. Raises EngineError when it cannot be started."""
        self._name = Path(command[0]).name
        self._log = log
        self.started = time.monotonic()
        try:
            with log.open("ab") as file:
                self._process = subprocess.Popen(
                    command, stdout=file, stderr=file, env=environment, preexec_fn=die_with_parent
                )
        except OSError as error:
            raise EngineError(f"{self._name} cannot be started: {error.strerror}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, is_ready: Callable[[], bool], timeout: float) -> None:
        """Until it is ready. Raises EngineError, with the last line that the server wrote."""
        while not is_ready():
            if self._process.poll() is not None:
                raise EngineError(f"ended with exit code {self._process.returncode}: {self._last_line()}")
            if time.monotonic() - self.started > timeout:
                raise EngineError(f"not ready within {timeout:.0f} s: {self._last_line()}")
            time.sleep(_POLL_SECONDS)

    def _last_line(self) -> str:
        text = self._log.read_text(errors="replace")
        print(text, flush=True)  # into the worker's own log
        return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "no message")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        # What is still there is killed by the parent, which adopts orphans.
        self._process.kill()
        self._process.wait()
