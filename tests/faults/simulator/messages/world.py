"""All processes of one schedule, what becomes of those that die, and what must hold meanwhile."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from kvmanager.service import Manager
from pagehold.runtime.statedir import StateDir
from services.executor.server import Description
from services.executor.shared import SharedPool
from tests.faults.simulator.faults import Countdown, DyingMemory, ExecutorKilled, Killed, ManagerKilled, Violation
from tests.faults.simulator.invariants import Pool, check_core
from tests.faults.simulator.messages.components import Executor, Settings, start_frontend, start_manager
from tests.faults.simulator.messages.loop import Process, VirtualLoop, current_process
from tests.faults.simulator.messages.network import Network
from tests.faults.simulator.messages.requests import FINGERPRINT, MAX_MODEL_LEN, SHAPE, Planned
from tests.faults.simulator.messages.tokenizer import TOKENIZER_JSON
from tests.faults.simulator.model import OutputTruth

_FRONTENDS = 2
_RESTART_SECONDS = (0.005, 0.25)

Trace = Callable[[str], None]


class FrontendKilled(Killed):
    """At one of its failpoints."""


class World:
    """Outlives the processes: the state folder, the pages' K/V, the network."""

    def __init__(
        self,
        loop: VirtualLoop,
        network: Network,
        state: StateDir,
        settings: Settings,
        requests: list[Planned],
        rng: random.Random,
        deaths: dict[str, Countdown],
        trace: Trace | None,
    ) -> None:
        """deaths: by kind of component, at which of their stores and failpoints."""
        self.loop = loop
        self.network = network
        self.truths = {planned.truth.key: planned.truth for planned in requests}
        self.manager: Manager | None = None
        self.executor: Executor | None = None
        self.processes: dict[str, Process] = {}  # those that live, by component
        self.counts: Counter[str] = Counter()
        self.violations: list[Violation] = []
        self.over = False
        self._state = state
        self._settings = settings
        self._rng = rng
        self._deaths = deaths
        self._trace = trace
        self._memory = DyingMemory(deaths["manager"], rng)
        self._pool: Pool | None = None
        self._epoch = 0  # of the newest executor
        self._executors = 0

    def say(self, line: str) -> None:
        if self._trace is not None:
            self._trace(f"{self.loop.time() - 1000:9.4f} {line}")

    # --- lives ---

    def start(self) -> None:
        self._start("manager")
        self._start("executor")
        for number in range(_FRONTENDS):
            self._start(f"frontend {number}")

    def _start(self, name: str) -> None:
        if self.over:
            return
        process = self.processes[name] = Process(self.loop, name)
        process.on_death.append(lambda: self._died(process))
        self.network.attach(process)
        self.say(f"{name} starts")
        try:
            match name:
                case "manager":
                    memory, hit = self._memory, self._manager_hit
                    arguments = (self.network, process, self._state, memory, hit, self._fail)
                    self.manager = process.run(start_manager, *arguments)
                case "executor":
                    self._executors += 1
                    settings = (self._settings, self._description(), self._pool_of, self.hit, self.attached)
                    number = self._executors
                    self.executor = process.run(Executor, self.network, process, self._state, number, *settings)
                case _:
                    process.run(start_frontend, self.network, process)
        except Killed:
            process.kill()

    def _died(self, process: Process) -> None:
        name = process.name
        if self.over:
            return
        self.say(f"{name} dies")
        self.counts[name.split()[0]] += 1
        del self.processes[name]
        if name == "manager":
            self.manager = None
        elif name == "executor" and self.executor is not None:
            self.counts["preemptions"] += self.executor.engine.pages.preemptions
            self.executor = None
        self.loop.call_later(self._rng.uniform(*_RESTART_SECONDS), self._start, name)
        # Not here: whoever died may be in the middle of a call.
        self.loop.call_soon(self.check)

    @property
    def preemptions(self) -> int:
        """Of all executors."""
        return self.counts["preemptions"] + (self.executor.engine.pages.preemptions if self.executor is not None else 0)

    def kill(self, name: str) -> None:
        if name in self.processes:
            self.processes[name].kill()

    def _fail(self, error: Exception) -> None:
        self.violations.append(Violation(f"the manager fails: {type(error).__name__}: {error}"))

    # --- deaths at a place ---

    def _manager_hit(self, name: str) -> None:
        if self._deaths["manager"].due():
            self.say(f"manager is to die at {name}")
            raise ManagerKilled

    def hit(self, name: str) -> None:
        """A failpoint or a store of an executor or a frontend."""
        process = current_process()
        if process is None or not process.alive:
            return
        if process.name == "executor" and self._deaths["executor"].due():
            self.say(f"executor is to die at {name}")
            process.kill()
            raise ExecutorKilled
        if process.name.startswith("frontend") and self._deaths["frontend"].due():
            process.kill()
            raise FrontendKilled

    # --- what is shared ---

    def attached(self, epoch: int) -> None:
        """An executor has attached for the first time."""
        if epoch <= self._epoch:
            self.violations.append(Violation("a new executor was given an old epoch"))
        self._epoch = epoch

    def _pool_of(self, shared: SharedPool) -> Pool:
        """The pages' contents outlive the executor, as the pool's memory does."""
        if self._pool is None:
            content = {content: vectors for truth in self.truths.values() for content, vectors in truth.pages.items()}
            self._pool = Pool(shared.tables, content)
        return self._pool

    def truth(self, key: str, index: int) -> OutputTruth:
        return self.truths[key].outputs[index]

    def _description(self) -> Description:
        model: Any = SimpleNamespace(
            name="model",
            fingerprint=FINGERPRINT,
            spec=SimpleNamespace(vocab_size=SHAPE.vocabulary),
            eos_token_ids=(),
            tokenizer_json=TOKENIZER_JSON,
            chat_template="",
            special_tokens={},
            add_bos_token=False,
            bos_token_id=None,
        )
        return Description(model, "model", MAX_MODEL_LEN, "cpu", "float32", "float32", True, "off")

    # --- checks ---

    def check(self) -> None:
        """Between two turns of the manager."""
        try:
            self._check()
        except Violation as violation:
            self.violations.append(violation)

    def _check(self) -> None:
        if self.loop.faults:
            fault = self.loop.faults[0]
            raise (
                fault
                if isinstance(fault, Violation)
                else Violation(f"a process fails: {type(fault).__name__}: {fault}")
            )
        manager = self.manager
        if manager is None or manager.core is None or self._pool is None:
            return
        check_core(manager.core, self._pool, self.truth)
        self.counts["checks"] += 1

    def is_idle(self) -> bool:
        """Nothing is held any more, and nothing on its way."""
        manager, executor = self.manager, self.executor
        if manager is None or executor is None or manager.core is None or manager.records is None:
            return False
        return not (manager.core.live_rows or manager.records.unfinished_keys or executor.has_work)

    def check_finished(self) -> None:
        """Raises Violation. Every request has ended, and everything was given back."""
        self._check()
        manager = self.manager
        if not self.is_idle() or manager is None or manager.core is None:
            raise Violation("a request never ended, or its rows were never given back")
        core = manager.core
        if core.pages.available + len(core.pins.pages) != core.pages.usable:
            raise Violation("pages leaked")
