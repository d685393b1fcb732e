"""What is refused before any memory is made or opened, each with one sentence that says what to do."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvmanager.layout import PoolKind

_DEFAULT_PIPES: Final = Path("/tmp/nvidia-mps")


@dataclass(frozen=True, slots=True)
class Identity:
    """A process as it sees itself."""

    pid: int
    pid_namespace: int  # inode

    @classmethod
    def own(cls) -> Identity:
        return cls(os.getpid(), os.stat("/proc/self/ns/pid").st_ino)


def refused_pids(kind: PoolKind, manager: Identity, executor: Identity) -> str:
    """Empty when nothing is wrong. Legacy IPC takes equal pids for one process, and refuses to open its own memory."""
    if kind is not PoolKind.IPC or manager.pid != executor.pid or manager.pid_namespace == executor.pid_namespace:
        return ""
    return (
        f"kvmanager and executor both have pid {manager.pid}, in PID namespaces of their own, and legacy CUDA IPC "
        "takes them for one process; start both in one PID namespace (`docker --pid`), or use --pool vmm"
    )


def refused_mps(environment: Mapping[str, str], default: Path = _DEFAULT_PIPES) -> str:
    """Empty when this process would not become a client of MPS, whose server goes on with a dead client's work."""
    pipes = Path(environment.get("CUDA_MPS_PIPE_DIRECTORY") or default)
    if not _is_answered(pipes):
        return ""
    return (
        f"an MPS daemon answers in {pipes}, and under MPS the death of an executor does not prove that its GPU work "
        "has stopped; stop it (`echo quit | nvidia-cuda-mps-control`), or point CUDA_MPS_PIPE_DIRECTORY to an empty "
        "folder for kvmanager and executor"
    )


def _is_answered(pipes: Path) -> bool:
    """Whether a daemon lives behind the control pipe; its pid would be one of another namespace's in a container."""
    control = pipes / "control"
    try:
        if stat.S_ISSOCK(control.stat().st_mode):
            with socket.socket(socket.AF_UNIX) as asking:
                asking.connect(os.fspath(control))
        else:
            os.close(os.open(control, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EPERM)
    return True
