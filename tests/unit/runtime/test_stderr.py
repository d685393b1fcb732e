"""Standard error that never fails and never waits."""

from __future__ import annotations

import errno

from pagehold.runtime.stderr import Stderr


def test_a_line_is_one_write_and_what_is_dropped_is_said() -> None:
    written: list[bytes] = []
    full = False

    def write(data: bytes) -> int:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(data)
        return len(data)

    stderr = Stderr(write)
    print("one", "line", file=stderr)
    full = True
    print("lost", file=stderr, flush=True)
    print("lost too", file=stderr)
    full = False
    print("another \udcff", file=stderr)
    print("and one", file=stderr)
    assert written == [
        b"one line\n",
        b"[2 messages could not be written]\nanother \\udcff\n",
        b"and one\n",
    ]
