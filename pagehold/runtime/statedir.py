"""The state folder: one place for the names of everything in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_LONGEST_SOCKET: Final = 107  # bytes of a path that a Unix socket takes


class StateDirError(Exception):
    """The state folder cannot be used; the message says what to do."""


def default_state_dir() -> Path:
    return Path(f"/dev/shm/pagehold-{os.getuid()}")


def frontend_name(instance: int) -> str:
    """What the frontend of this number is called: `frontend`, `frontend-2`, ..."""
    return "frontend" if instance == 1 else f"frontend-{instance}"


@dataclass(frozen=True, slots=True)
class StateDir:
    """Paths of the shared files, locks and sockets; see docs/lifecycle.md."""

    root: Path

    @classmethod
    def prepare(cls, root: Path) -> StateDir:
        """Makes the folder (mode 0700) or takes an existing one that belongs to this user."""
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot make the state folder {root}: {error.strerror}; choose another --state-dir"
            raise StateDirError(message) from error
        if root.stat().st_uid != os.getuid():
            raise StateDirError(f"the state folder {root} belongs to another user; choose another --state-dir")
        state = cls(root)
        if len(os.fsencode(state.kvmanager_socket)) > _LONGEST_SOCKET:
            raise StateDirError(f"the path of the state folder {root} is too long for a socket; choose a shorter one")
        state.records.mkdir(mode=0o700, exist_ok=True)
        return state

    @property
    def tables(self) -> Path:
        return self.root / "tables"

    @property
    def pool(self) -> Path:
        return self.root / "pool"

    @property
    def records(self) -> Path:
        """Folder of `<key>.req` and `<key>.log`."""
        return self.root / "records"

    @property
    def manager_lock(self) -> Path:
        return self.root / "manager.lock"

    @property
    def executor_lock(self) -> Path:
        return self.root / "executor.lock"

    @property
    def supervisor_lock(self) -> Path:
        return self.root / "supervisor.lock"

    @property
    def kvmanager_socket(self) -> Path:
        return self.root / "kvmanager.sock"

    @property
    def executor_socket(self) -> Path:
        return self.root / "executor.sock"

    @property
    def supervisor_socket(self) -> Path:
        return self.root / "supervisor.sock"

    def own_supervisor_socket(self, name: str) -> Path:
        """Of a supervisor that keeps component `name` alone."""
        return self.root / f"supervisor-{name}.sock"

    def socket_of(self, name: str) -> Path:
        """Of the frontend of this name, for operators."""
        return self.root / f"{name}.sock"

    @property
    def leash_socket(self) -> Path:
        """Where file descriptors go between executor and manager."""
        return self.root / "leash.sock"

    def progress(self, component: str) -> Path:
        return self.root / f"{component}.progress"

    def failpoints(self, component: str) -> Path:
        """What the next process of this component arms, once; for tests."""
        return self.root / f"{component}.failpoints"

    def remove(self) -> None:
        """Deletes what Pagehold put there. Only for whoever knows that nobody uses it."""
        if self.records.is_dir():
            for path in self.records.iterdir():
                path.unlink(missing_ok=True)
            self.records.rmdir()
        files = (self.tables, self.tables.with_suffix(".new"), self.pool)
        locks = (self.manager_lock, self.executor_lock, self.supervisor_lock)
        sockets = self.root.glob("*.sock")
        # Locks last: once they are gone the folder may be another's.
        for path in (*files, *sockets, *self.root.glob("*.progress"), *self.root.glob("*.failpoints"), *locks):
            path.unlink(missing_ok=True)
        try:
            self.root.rmdir()
        except OSError:
            pass  # the operator keeps something of their own there
