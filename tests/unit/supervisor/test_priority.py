"""A process that loads in the background is later as quick as any, with all its threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from services.supervisor import priority

PROGRAM = """
import threading, sys
for _ in range(3):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print(flush=True)
sys.stdin.read()
"""


def test_every_thread_gets_its_priority_back() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        if not priority.lower(process.pid):
            process.kill()
            pytest.skip("a priority that is lowered here stays low")
        assert process.stdout is not None
        process.stdout.readline()
        threads = [int(name) for name in os.listdir(f"/proc/{process.pid}/task")]
        assert len(threads) == 4
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) > own
        priority.restore(process.pid)
        assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {own}
        process.kill()


def test_a_process_that_is_gone_is_left_alone() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert not priority.lower(gone.pid)
    priority.restore(gone.pid)
