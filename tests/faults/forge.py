"""Makes managers quickly: a process that has imported everything and forks one for each line it reads.

A line on standard input names the failpoints of the next manager. Two lines come back: its pid, and when
it is dead how it ended, as `subprocess.Popen.returncode` has it. gRPC must not be in use before a fork,
so whoever drives these managers is another process.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from kvmanager.main import main as run_manager
from pagehold.runtime.process import die_with_parent
from pagehold.runtime.progress import State, read_progress
from pagehold.runtime.settings import KvManagerSettings
from pagehold.runtime.statedir import StateDir

START_SECONDS = 20.0


class Forge:
    """The driver's side: managers one after the other on one state folder."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forge", str(state.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # a thread would not outlive the fork
        )
        self.pid = 0

    def close(self) -> None:
        """Its end takes the manager with it."""
        self._process.kill()
        self._process.communicate()

    def start(self, failpoints: str) -> None:
        """A manager that serves, or died before it did."""
        assert self._process.stdin is not None
        self._process.stdin.write(failpoints + "\n")
        self._process.stdin.flush()
        self.pid = self._answer()
        deadline = time.monotonic() + START_SECONDS
        while not self._serves():
            assert time.monotonic() < deadline, "the manager does not serve"
            time.sleep(0.002)

    def kill(self) -> int:
        """kill -9; how it ended."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        """How the manager ended: the exit code, or minus the number of the signal."""
        return self._answer()

    def _serves(self) -> bool:
        view = read_progress(self._state.progress("kvmanager"))
        return view is not None and view.pid == self.pid and view.state is State.READY

    def _answer(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the forge is gone"
        return int(line)


def serve(root: Path) -> None:
    """Forks a manager for each line, one at a time, until its driver is gone."""
    me = os.getpid()
    gc.freeze()  # or the first collection of each child would copy every page that holds an object
    for line in sys.stdin:
        child = os.fork()
        if not child:
            die_with_parent(me)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(2, 1)
            os._exit(run_manager(KvManagerSettings(state_dir=root, failpoints=line.strip(), log_level="error")))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    die_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    serve(Path(sys.argv[1]))
