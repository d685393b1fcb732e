"""Which processes a supervisor has, and how each is made."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final

from pagehold.runtime.lock import is_held
from pagehold.runtime.process import is_alive
from pagehold.runtime.progress import read_progress
from pagehold.runtime.settings import ComponentSettings, ExecutorSettings, FrontendSettings, KvManagerSettings
from pagehold.runtime.statedir import StateDir, frontend_name
from services.supervisor.child import Child
from services.supervisor.flags import flags_of

# In the order in which they stop: whoever serves others goes after them.
COMPONENTS: Final[dict[str, type[ComponentSettings]]] = {
    "frontend": FrontendSettings,
    "executor": ExecutorSettings,
    "kvmanager": KvManagerSettings,
}
_STOP_SECONDS: Final = 10.0
_TAKE_SECONDS: Final = 2.0
_POLL_SECONDS: Final = 0.02
# Of a new executor's first steps: with 16 streams on 2 cores, one that loads beside them makes the silence after a
# death 180 ms instead of 135.
_SETTLE_SECONDS: Final = 0.5


class Fleet:
    """The children, and what a new one of each component needs."""

    def __init__(
        self,
        state: StateDir,
        settings: ComponentSettings,
        components: Iterable[str],
        frontends: int = 1,
        standby: bool = False,
        shares_port: bool = False,
    ) -> None:
        """components: those that this supervisor keeps. standby: a second executor waits for the first one's lock."""
        self.children: list[Child] = []
        self.standby = standby
        self.shares_port = shares_port
        self.state = state
        self._past_deaths: Counter[str] = Counter()
        self._settings = settings
        self._first = settings.instance if isinstance(settings, FrontendSettings) else 1
        self._turn = asyncio.Lock()
        self._is_complete = False
        counts = {"frontend": frontends, "executor": 1 + standby, "kvmanager": 1}
        for component in components:
            for _ in range(counts[component]):
                self.children.append(self.make(component))
        self._is_complete = True

    def of(self, component: str) -> list[Child]:
        return [child for child in self.children if child.component == component]

    def not_ready(self) -> list[str]:
        """Names of those that are waited for. A standby is not."""
        executors = self.of("executor")
        served = any(child.is_up for child in executors)
        return [child.name for child in self.children if not child.is_up and not (child in executors and served)]

    def remove(self, child: Child) -> None:
        """It has been stopped for good."""
        if child in self.children:
            self.children.remove(child)
            self._past_deaths[child.component] += child.deaths

    def deaths(self) -> dict[str, int]:
        """Of each component that is kept here: processes that ended unasked since the supervisor started."""
        components = {child.component for child in self.children} | set(self._past_deaths)
        return {
            component: self._past_deaths[component] + sum(child.deaths for child in self.of(component))
            for component in sorted(components)
        }

    def make(self, component: str) -> Child:
        """A new one, which is not among the children yet."""
        if component == "frontend":
            return self._frontend()
        if component == "executor":
            names = ("executor", "executor-standby")
            return Child(
                component, self._flags(component), self.state, names, self._after_the_other, self._has_executor
            )
        return Child(component, self._flags(component), self.state)

    def _flags(self, component: str) -> list[str]:
        return flags_of(self._settings, COMPONENTS[component])

    def _frontend(self) -> Child:
        instance = self._first
        taken = {child.name for child in self.of("frontend")}
        while (name := frontend_name(instance)) in taken or (self._is_complete and self._lives(name)):
            instance += 1
        flags = [*self._flags("frontend"), "--instance", str(instance)]
        if self.shares_port:
            flags.append("--share-port")
        return Child("frontend", flags, self.state, (name,), is_served=self._has_frontend)

    def _lives(self, name: str) -> bool:
        view = read_progress(self.state.progress(name))
        return view is not None and is_alive(view)

    def _has_frontend(self) -> bool:
        return any(child.is_ready for child in self.of("frontend"))

    def _has_executor(self) -> bool:
        return any(child.is_ready for child in self.of("executor"))

    @asynccontextmanager
    async def _after_the_other(self, child: Child) -> AsyncIterator[None]:
        """Executors start one after the other: one that loads does not delay one that is about to serve."""
        async with self._turn:
            free_since = None
            has_waited = False
            while others := [one for one in self.of("executor") if one is not child and one.pid and not one.is_ready]:
                has_waited = True
                await asyncio.sleep(_POLL_SECONDS)
                now = time.monotonic()
                free_since = None if is_held(self.state.executor_lock) else free_since or now
                if free_since and now - free_since > _TAKE_SECONDS:
                    # No executor, and none that loads: they only wait. A standby that can run has the lock at once.
                    for other in others:
                        other.kill_standby()
            if has_waited:
                await asyncio.sleep(_SETTLE_SECONDS)
            yield

    def stop_seconds(self, component: str) -> float:
        """How long a process of it may take to stop; a frontend drains first."""
        settings = self._settings
        if component == "frontend" and isinstance(settings, FrontendSettings):
            return _STOP_SECONDS + settings.drain_seconds
        return _STOP_SECONDS
