"""A file lock is a proof of death: held means alive, got means all earlier holders are dead."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pagehold.runtime.lock import FileLock, LockBusy, is_held, read_id

HOLDER = """
import sys, time
from pathlib import Path
from pagehold.runtime.lock import FileLock
lock = FileLock(Path(sys.argv[1]))
lock.acquire()
lock.write_id(b"holder of a lock")
print("held", flush=True)
time.sleep(60)
"""


def start_holder(path: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.lock"


def test_one_holder_at_a_time(path: Path) -> None:
    first, second = FileLock(path), FileLock(path)
    first.acquire()
    with pytest.raises(LockBusy):
        second.acquire()
    first.release()
    second.acquire()


def test_a_dead_process_holds_nothing_and_its_id_stays(path: Path) -> None:
    holder = start_holder(path)
    lock = FileLock(path)
    with pytest.raises(LockBusy):
        lock.acquire()
    holder.send_signal(signal.SIGKILL)
    started = time.monotonic()
    lock.acquire(wait=True)
    assert time.monotonic() - started < 5
    holder.wait()
    assert read_id(path) == b"holder of a lock"


def test_a_lock_on_an_unlinked_file_proves_nothing(path: Path) -> None:
    old = FileLock(path)
    old.acquire()
    path.unlink()
    new = FileLock(path)
    new.acquire()  # another file: nobody holds it
    with pytest.raises(LockBusy):
        FileLock(path).acquire()
    old.release()
    with pytest.raises(LockBusy):
        FileLock(path).acquire()


def test_who_waited_on_an_unlinked_file_takes_the_one_that_is_named(path: Path) -> None:
    old, waiting = FileLock(path), FileLock(path)
    old.acquire()
    thread = threading.Thread(target=lambda: waiting.acquire(wait=True), daemon=True)
    thread.start()
    time.sleep(0.1)
    path.unlink()
    old.release()
    thread.join(5)
    assert not thread.is_alive() and path.exists()
    with pytest.raises(LockBusy):
        FileLock(path).acquire()


def test_a_child_does_not_keep_the_lock_alive(path: Path) -> None:
    lock = FileLock(path)
    lock.acquire()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    try:
        lock.release()
        deadline = time.monotonic() + 10
        while True:
            try:
                FileLock(path).acquire()
                break
            except LockBusy:
                # The child may still be about to close it: exec does so a moment after the parent goes on.
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        child.kill()
        child.wait()


def test_an_id_that_was_never_written_is_empty(path: Path) -> None:
    assert read_id(path) == b""
    lock = FileLock(path)
    lock.acquire()
    assert read_id(path) == b""
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_look_at_a_free_lock_keeps_nobody_who_is_patient_from_it(path: Path) -> None:
    path.touch()
    with path.open("rb") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        with pytest.raises(LockBusy):
            FileLock(path).acquire()
        threading.Timer(0.05, look.close).start()
        FileLock(path).acquire(patience=30.0)


def test_whether_it_is_held_is_seen_without_taking_it(path: Path) -> None:
    assert not is_held(path) and not path.exists()
    lock = FileLock(path)
    lock.acquire()
    assert is_held(path)
    lock.release()
    assert not is_held(path)
    FileLock(path).acquire()
