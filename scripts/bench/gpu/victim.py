"""A process to be killed: owns a pool, or maps one, and does what it is told.

`python -m gpu.victim FD DRIVER`: FD is a Unix socket on which pickled commands come and answers go; descriptors of
memory travel beside them. DRIVER: as in `kvmanager.device.memory.load_driver`; empty: CUDA.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gpu.access import Access, access
from gpu.job import python_path
from kvmanager.device.memory import Allocation, DeviceError, Export, Mapping, load_driver
from kvmanager.layout import PoolKind

_MESSAGE: Final = 1 << 16
_ANSWER_SECONDS: Final = 60.0
PATTERN: Final = bytes(range(256)) * 16


class Died(Exception):
    """The process ended, or said why it cannot."""


class Victim:
    """The tester's end. Killed at the end of a `with` at the latest."""

    def __init__(self, driver: str, wrapper: Sequence[str] = ()) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_ANSWER_SECONDS)
        words = [*wrapper, sys.executable, "-m", "gpu.victim", str(theirs.fileno()), driver]
        self.process = subprocess.Popen(words, pass_fds=(theirs.fileno(),), env=_environment())
        theirs.close()
        self.pid: int = self._receive()[0]  # its own view of it

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self._socket.close()

    def ask(self, command: str, *arguments: object, fd: int | None = None) -> Any:
        """What the command returns. Raises Died."""
        return self.ask_with_descriptor(command, *arguments, fd=fd)[0]

    def ask_with_descriptor(self, command: str, *arguments: object, fd: int | None = None) -> tuple[Any, int | None]:
        """The answer, and the descriptor that came with it, which is the caller's."""
        self.tell(command, *arguments, fd=fd)
        return self._receive()

    def tell(self, command: str, *arguments: object, fd: int | None = None) -> None:
        """Without waiting for the answer."""
        message = pickle.dumps((command, arguments))
        socket.send_fds(self._socket, [message], [fd] if fd is not None else [])

    def _receive(self) -> tuple[Any, int | None]:
        try:
            message, fds, _, _ = socket.recv_fds(self._socket, _MESSAGE, 1)
        except TimeoutError as error:
            raise Died(f"no answer within {_ANSWER_SECONDS:.0f} s") from error
        if not message:
            raise Died(f"it ended with {self.process.wait()}")
        ok, value = pickle.loads(message)
        if not ok:
            raise Died(value)
        return value, fds[0] if fds else None

    def kill(self) -> float:
        """kill -9; the seconds until its pidfd says that it is gone."""
        if self.process.returncode is not None:
            return 0.0
        began = time.monotonic()
        self.process.kill()
        self.process.wait()  # as a pidfd, it does not return before the process's files are closed
        return time.monotonic() - began


def _environment() -> dict[str, str]:
    root = Path(__file__).resolve().parents[1]
    return {**os.environ, "PYTHONPATH": python_path(root, root.parents[1])}


class _Process:
    """The victim's end: one method a command."""

    def __init__(self, driver: str) -> None:
        self._driver = load_driver(driver)
        self._host = bool(driver)
        self._kept: list[Allocation | Mapping] = []
        self._access: Access | None = None
        self.descriptor: int | None = None  # goes with the answer

    @property
    def access(self) -> Access:
        if self._access is None:
            self._access = access(self._host)
        return self._access

    def own(self, kind: PoolKind, nbytes: int) -> Export:
        """Allocates a pool."""
        device = self._driver.importer(kind).device(0)
        allocation = self._driver.exporter(kind).allocate(nbytes, device)
        self._kept.append(allocation)
        self.descriptor = allocation.fd
        return allocation.export

    def attach(self, export: Export, fd: int | None) -> int:
        """Maps a pool; its address here."""
        _ = self.access  # the primary context comes first
        mapping = self._driver.importer(export.kind).open(export, fd)
        self._kept.append(mapping)
        return mapping.address

    def read(self, address: int, nbytes: int) -> bytes:
        return self.access.read(address, nbytes)

    def write(self, address: int, data: bytes) -> None:
        self.access.write(address, data)

    def spin(self, address: int, seconds: float) -> None:
        self.access.spin(address, seconds)

    def fault(self) -> None:
        self.access.fault()


def _serve(fd: int, driver: str) -> None:
    with socket.socket(fileno=fd) as link:
        process = _Process(driver)
        link.send(pickle.dumps((True, os.getpid())))
        while True:
            message, fds, _, _ = socket.recv_fds(link, _MESSAGE, 1)
            if not message:
                return
            command, arguments = pickle.loads(message)
            if command == "attach":
                arguments = (*arguments, fds[0] if fds else None)
            process.descriptor = None
            try:
                answer = (True, getattr(process, command)(*arguments))
            except (DeviceError, OSError, RuntimeError, ImportError) as error:
                answer = (False, f"{type(error).__name__}: {error}")
            sent: list[int] = [process.descriptor] if process.descriptor is not None else []
            socket.send_fds(link, [pickle.dumps(answer)], sent)
            for one in fds:
                os.close(one)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2])
