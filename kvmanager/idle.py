"""The daemon checks itself when it has nothing else to do, a few milliseconds at a time.

busy ──quiet for a while──▶ checking ──all steps done──▶ checked
  ▲                            │                            │
  └────────────── anything changes: what was seen so far is void ◀──┘

Derived state that differs from sound tables is derived anew. Stored words are only reported: they are
repaired while nobody uses them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from typing import Final

import structlog

from kvmanager.core import ManagerCore
from kvmanager.findings import Finding
from kvmanager.integrity import check_steps

log = structlog.get_logger()

QUIET_SECONDS: Final = 3.0  # without a change, until it begins
_APART_SECONDS: Final = 60.0  # between the ends of two checks, at least
_SLICE_SECONDS: Final = 0.002
_PAUSE_SECONDS: Final = 0.01  # between slices: calls come first
_LOOK_SECONDS: Final = 0.5  # between looks whether it is quiet
_MOST_LOGGED: Final = 20
_MOST_SEEN: Final = 10_000


class IdleCheck:
    """One core's checks. Everything runs on the thread of the calls."""

    def __init__(
        self,
        core: Callable[[], ManagerCore | None],
        changes: Callable[[], Hashable],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """core: None while there is no pool. changes: another value after every call that may change the core."""
        self.findings = 0  # found since the start, each once
        self._core = core
        self._changes = changes
        self._clock = clock
        self._marker: Hashable = None
        self._quiet_since = clock()
        self._next = 0.0
        self._is_checked = False
        self._steps: Iterator[list[Finding]] | None = None
        self._found: list[Finding] = []
        self._seen: set[Finding] = set()

    def work(self) -> float:
        """One slice. Returns the seconds until the next one is due."""
        now, core = self._clock(), self._core()
        # Rows may also go away between calls; each time, the turn counts up.
        marker = (self._changes(), id(core), core.pages.turn if core is not None else 0)
        if marker != self._marker:
            self._marker, self._quiet_since = marker, now
            self._steps, self._is_checked = None, False
        if core is None or self._is_checked or now < max(self._quiet_since + QUIET_SECONDS, self._next):
            return _LOOK_SECONDS
        if self._steps is None:
            self._steps, self._found = check_steps(core, orphans=True), []
        while self._clock() - now < _SLICE_SECONDS:
            step = next(self._steps, None)
            if step is None:
                self._finish(core)
                return _LOOK_SECONDS
            self._found += step
        return _PAUSE_SECONDS

    def _finish(self, core: ManagerCore) -> None:
        self._steps, self._is_checked = None, True
        self._next = self._clock() + _APART_SECONDS
        fresh = [finding for finding in self._found if finding not in self._seen]
        self.findings += len(fresh)
        for finding in fresh[:_MOST_LOGGED]:
            remedy = "derived anew" if finding.is_derived else "run pagehold fsck"
            log.error("integrity", kind=finding.kind.name, finding=str(finding), remedy=remedy)
        stored = [finding for finding in self._found if not finding.is_derived]
        if len(self._seen) < _MOST_SEEN:
            self._seen.update(stored)
        # From tables that are wrong nothing right can be derived.
        if self._found and not stored:
            core.rebuild()
