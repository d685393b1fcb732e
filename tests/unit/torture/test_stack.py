"""What torture reads of a process: memory of its own, not the pages that all share."""

from __future__ import annotations

import subprocess
import sys

import pytest

from services.torture.stack import resident

PROGRAM = """
import mmap, sys
kept = {kept}
print(flush=True)
sys.stdin.read()
"""
NBYTES = 48 << 20


@pytest.mark.parametrize(
    ("kept", "counts"),
    [
        (f"bytearray(b'x') * {NBYTES}", True),
        (f"mmap.mmap(-1, {NBYTES}, mmap.MAP_SHARED); kept[:] = b'x' * {NBYTES}", False),
    ],
    ids=["its own", "shared"],
)
def test_memory_of_its_own(kept: str, counts: bool) -> None:
    def bytes_of(program: str) -> int:
        with subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None and process.stdin is not None
            process.stdout.readline()
            found = resident(process.pid)
            process.stdin.close()
        assert found[1] >= 3
        return found[0]

    grown = bytes_of(PROGRAM.format(kept=kept)) - bytes_of(PROGRAM.format(kept="0"))
    assert (grown > NBYTES * 0.9) == counts


def test_a_process_that_is_gone_has_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert resident(process.pid) == (0, 0)
