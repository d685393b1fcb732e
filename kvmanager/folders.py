"""State folders as they are found: whose, alive or dead, and what they hold. And the removal of dead ones.

Life is a held lock. A pid is only shown, if the process that wrote it still runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from kvmanager import pool as pools
from kvmanager.device.memory import uuid_name
from kvmanager.geometry import HOST, Place, read_fingerprint, read_place
from kvmanager.layout import HEADER_WORDS, Header, PoolKind
from kvmanager.pool import CannotAdopt
from kvmanager.recordcheck import map_log
from kvmanager.vacant import ALL, Holder, holders_of, vacant
from pagehold.runtime.process import is_alive
from pagehold.runtime.progress import read_progress
from pagehold.runtime.statedir import StateDir


class Condition(Enum):
    """Of a folder's tables."""

    SOUND = "sound"  # what a manager would adopt; `fsck` says more
    NO_TABLES = "no tables"  # nothing was made yet, or it was left half-made
    UNUSABLE = "unusable"  # damaged, of another boot or of another layout version


@dataclass(frozen=True, slots=True)
class Folder:
    """One state folder."""

    path: Path
    holders: tuple[Holder, ...]  # who lives
    manager_pid: int | None
    executor_pid: int | None
    age_seconds: float
    condition: Condition
    reason: str  # why it is unusable
    epoch: int
    fingerprint: str  # of the model: 64 hex digits, or none
    pool_bytes: int  # that have memory behind them, of this machine
    device: str  # whose memory the pool is, as nvidia-smi names it; empty: this machine's
    device_bytes: int  # of it; a dead folder has none
    tables_bytes: int
    records_bytes: int
    records: int
    unfinished: int  # with an output that has not ended

    @property
    def is_live(self) -> bool:
        return bool(self.holders)

    @property
    def nbytes(self) -> int:
        return self.pool_bytes + self.tables_bytes + self.records_bytes


@dataclass(frozen=True, slots=True)
class Kept:
    """Why a folder was left as it is. Not an error: live folders, and those with requests, are meant to stay."""

    reason: str


def find(parent: Path) -> list[StateDir]:
    """The state folders of this user in `parent`, by name."""
    try:
        entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
    except OSError:
        return []
    folders = [StateDir(Path(entry.path)) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return [state for state in folders if is_ours(state)]


def is_ours(state: StateDir) -> bool:
    """Whether it is a folder of this user with something of Pagehold's in it."""
    try:
        if state.root.stat().st_uid != os.getuid() or not state.root.is_dir():
            return False
        marks = (state.manager_lock, state.executor_lock, state.supervisor_lock, state.tables, pools.half_made(state))
        return any(path.is_file() for path in marks)
    except OSError:
        return False


def survey(state: StateDir) -> Folder:
    """A look at a folder in which anything may change meanwhile. Changes nothing."""
    holders = holders_of(state)
    header, condition, reason = _header(state)
    place = _place(header)
    logs = [path for path in _files(state.records) if path.suffix == ".log"]
    return Folder(
        path=state.root,
        holders=holders,
        manager_pid=_pid(state, "kvmanager"),
        executor_pid=_pid(state, "executor"),
        age_seconds=_age(state),
        condition=condition,
        reason=reason,
        epoch=int(header[Header.EPOCH]) if header is not None else 0,
        fingerprint=read_fingerprint(header) if header is not None else "",
        pool_bytes=_allocated([state.pool]),
        device=uuid_name(place.device) if place.kind is not PoolKind.HOST else "",
        device_bytes=_device_bytes(header, holders) if place.kind is not PoolKind.HOST else 0,
        tables_bytes=_allocated([state.tables, pools.half_made(state)]),
        records_bytes=_allocated(_files(state.records)),
        records=sum(path.suffix == ".req" for path in _files(state.records)),
        unfinished=sum(map(_is_unfinished, logs)),
    )


def reclaim(state: StateDir, force: bool) -> int | Kept:
    """Removes a dead folder; how many bytes that gave back. force: also with requests that have not ended.

    Raises InUse: somebody lives.
    """
    with vacant(state, "it is reclaimed", ALL):
        found = survey(state)
        if found.unfinished and not force:
            return Kept(f"{found.unfinished} of its requests have not ended; --force drops them")
        state.remove()
        return found.nbytes


def _header(state: StateDir) -> tuple[np.ndarray | None, Condition, str]:
    try:
        pool = pools.examine(state)
    except CannotAdopt as error:
        try:
            header = np.fromfile(state.tables, np.uint64, HEADER_WORDS)
        except OSError:
            header = np.zeros(0, np.uint64)
        return header if len(header) == HEADER_WORDS else None, Condition.UNUSABLE, str(error)
    except OSError as error:
        return None, Condition.UNUSABLE, f"{state.tables} cannot be read: {error.strerror}"
    if pool is None:
        return None, Condition.NO_TABLES, ""
    return pool.tables.header, Condition.SOUND, ""


def _place(header: np.ndarray | None) -> Place:
    try:
        return read_place(header) if header is not None else HOST
    except ValueError:
        return HOST  # of tables that nobody can use


def _device_bytes(header: np.ndarray | None, holders: tuple[Holder, ...]) -> int:
    """A device's memory goes with the last process that has it."""
    lives = Holder.MANAGER in holders or Holder.EXECUTOR in holders
    return int(header[Header.POOL_BYTES]) if header is not None and lives else 0


def _pid(state: StateDir, component: str) -> int | None:
    view = read_progress(state.progress(component))
    return view.pid if view is not None and is_alive(view) else None


def _age(state: StateDir) -> float:
    """Locks are made once and hardly written, so the oldest of them tells when a folder was first used."""
    times = [state.root.stat().st_mtime]
    for holder in ALL:
        try:
            times.append(holder.lock(state).stat().st_mtime)
        except OSError:
            continue  # that component never ran here
    return max(time.time() - min(times), 0.0)


def _files(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
    except OSError:
        return []


def _allocated(paths: Iterable[Path]) -> int:
    """Bytes of memory behind these files."""
    total = 0
    for path in paths:
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue  # forgotten meanwhile
    return total


def _is_unfinished(log: Path) -> bool:
    """A record that cannot be read counts as ended: nobody can go on with it."""
    try:
        return log.with_suffix(".req").exists() and not all(output.ended for output in map_log(log).outputs)
    except (OSError, ValueError):
        return False
