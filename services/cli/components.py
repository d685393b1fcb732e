"""The processes of a state folder, from their progress files: what `status` and `top` begin with."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from pagehold.runtime.lock import is_held
from pagehold.runtime.process import is_alive, is_elsewhere
from pagehold.runtime.progress import State, read_progress
from pagehold.runtime.statedir import StateDir

KINDS: Final = ("frontend", "kvmanager", "executor")


@dataclass(frozen=True, slots=True)
class Component:
    """A process, or the place of one that is down."""

    name: str  # `frontend`, `frontend-2`, `executor-standby`, ...
    kind: str  # of `KINDS`
    state: State
    pid: int | None = None  # None: it is down; what follows says nothing then, but `starts`
    started_ns: int = 0  # CLOCK_MONOTONIC
    starts: int = 0  # processes of this name so far; 0: unknown
    findings: int = 0  # of the manager's own checks

    @property
    def is_down(self) -> bool:
        return self.pid is None

    @property
    def uptime_seconds(self) -> float:
        return (time.monotonic_ns() - self.started_ns) / 1e9


def look(state: StateDir) -> list[Component]:
    """Those of one kind together, each kind's first one always there, others also when they are down."""
    found = []
    for kind in KINDS:
        found.append(_component(state, kind, kind))
        more = (path.stem for path in state.root.glob(f"{kind}-*.progress"))
        found += [_component(state, name, kind) for name in sorted(more, key=lambda name: (len(name), name))]
    return found


def _component(state: StateDir, name: str, kind: str) -> Component:
    view = read_progress(state.progress(name))
    if view is None:
        return Component(name, kind, State.DOWN)
    if view.state is State.DOWN and name != kind:  # a standby that lives on as the executor
        return Component(name, kind, State.DOWN, starts=view.starts)
    lock = {"kvmanager": state.manager_lock, "executor": state.executor_lock}.get(name)
    if not is_alive(view) or (lock is not None and is_elsewhere(view) and not is_held(lock)):
        return Component(name, kind, State.DOWN, starts=view.starts)
    now = State.STALLED if view.overdue else view.state
    return Component(name, kind, now, view.pid, view.started_ns, view.starts, view.findings)
