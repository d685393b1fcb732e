"""`pagehold health COMPONENT`: whether it does its work, from its progress alone; what a container's check runs.

A frontend without an executor does not, nor does an executor without a manager. Nothing is sent to the component, so
one that is busy is not made busier, and one that hangs is found by its deadlines.
"""

from __future__ import annotations

from typing import Final

from pagehold.runtime.process import is_alive
from pagehold.runtime.progress import ProgressView, State, read_progress
from pagehold.runtime.settings import HealthSettings
from pagehold.runtime.statedir import StateDir

EXIT_UNHEALTHY: Final = 1


def main(settings: HealthSettings) -> int:
    """0 when it is ready, or a standby that could be at once; one line says what it is."""
    # A successor has another name than its predecessor.
    files = sorted(StateDir(settings.state_dir).root.glob(f"{settings.component}*.progress"))
    found = [_state(read_progress(path)) for path in files] or [State.DOWN]
    best = min(found, key=_ORDER.index)
    print(f"{settings.component}: {best.label}")
    return 0 if best in (State.READY, State.STANDBY) else EXIT_UNHEALTHY


_ORDER: Final = (State.READY, State.STANDBY, State.DRAINING, State.STARTING, State.STALLED, State.DOWN)


def _state(view: ProgressView | None) -> State:
    if view is None or not is_alive(view):
        return State.DOWN
    return State.STALLED if view.overdue else view.state
