"""A schedule: who asks for what, which process dies when, which stream breaks. A function of its seed alone."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pagehold.runtime.statedir import StateDir
from tests.faults.simulator.faults import Countdown, Violation
from tests.faults.simulator.messages.clients import ClientActor
from tests.faults.simulator.messages.components import Settings
from tests.faults.simulator.messages.loop import Process, VirtualLoop
from tests.faults.simulator.messages.network import Network
from tests.faults.simulator.messages.requests import plan_requests
from tests.faults.simulator.messages.seams import seams
from tests.faults.simulator.messages.world import Trace, World

_SHARED_MEMORY = Path("/dev/shm")
_FAULT_SECONDS = 0.03  # between two of the faults that come at any time, on average
_CHECK_SECONDS = 0.05
_SETTLE_SECONDS = 400.0  # until the last grace is over
_STORES = {"manager": 300, "executor": 300, "frontend": 60}  # stores and failpoints of a life that may be planned for


@dataclass(frozen=True, slots=True)
class Schedule:
    """`seed` draws everything but the number of faults."""

    seed: int
    requests: int = 4
    deaths: int = 3  # at planned stores and failpoints of the manager, the executor and the frontends
    faults: int = 4  # at any time: a process dies or a stream breaks

    @classmethod
    def drawn(cls, seed: int) -> Schedule:
        rng = random.Random(f"messages {seed}")
        return cls(seed, rng.randint(2, 5), rng.randint(0, 4), rng.randint(1, 6))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was met on the way; replayed, it is the same."""

    manager_deaths: int
    executor_deaths: int
    frontend_deaths: int
    client_deaths: int
    broken_streams: int
    messages: int
    lost_messages: int
    taken_over: int
    tokens: int
    preemptions: int
    refused: int
    checks: int


def run(schedule: Schedule, trace: Trace | None = None) -> Outcome:
    """Plays it to the end. Raises Violation naming the schedule: running that again fails the same way."""
    folder = Path(tempfile.mkdtemp(prefix="pagehold-simulator-", dir=_SHARED_MEMORY))
    try:
        return _Play(schedule, StateDir.prepare(folder), trace).play()
    except Exception as error:
        raise Violation(f"{schedule}: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(folder)


class _Play:
    def __init__(self, schedule: Schedule, state: StateDir, trace: Trace | None) -> None:
        rng = self._rng = random.Random(schedule.seed)
        self._schedule = schedule
        self._loop = VirtualLoop()
        self._network = Network(self._loop, rng)
        requests = plan_requests(rng, schedule.requests)
        settings = Settings(
            pages=rng.randint(9, 20),
            max_num_seqs=rng.randint(2, 6),
            max_batch_tokens=rng.choice((4, 8, 16)),
            park_after=rng.choice((4, 256)),
            prefix_cache=rng.random() < 0.85,
            fork=rng.random() < 0.85,
            depth=schedule.seed % 2,
            drafts=schedule.seed % 4 == 0,
        )
        arguments = (self._loop, self._network, state, settings, requests, rng, self._deaths(), trace)
        self._world = World(*arguments)
        self._clients = [ClientActor(self._network, planned, rng) for planned in requests]
        self._breaks = 0

    def _deaths(self) -> dict[str, Countdown]:
        planned: dict[str, set[int]] = {name: set() for name in _STORES}
        for _ in range(self._schedule.deaths):
            name = self._rng.choice(tuple(_STORES))
            planned[name].add(self._rng.randrange(_STORES[name]))
        return {name: Countdown(frozenset(stores)) for name, stores in planned.items()}

    def play(self) -> Outcome:
        with seams(self._network, self._world.hit):
            asyncio.set_event_loop(self._loop)
            try:
                self._loop.run_until_complete(self._main())
            finally:
                self._end()
                asyncio.set_event_loop(None)
        return self._outcome()

    async def _main(self) -> None:
        world, loop = self._world, self._loop
        world.start()
        own = Process(loop, "simulator")
        clients = [own.spawn(client.run()) for client in self._clients]
        own.spawn(self._disturb())
        own.spawn(self._look())
        deadline = loop.time() + 2 * _SETTLE_SECONDS
        while not all(client.done() for client in clients):
            await asyncio.sleep(0.05)
            self._raise(clients)
            if loop.time() > deadline:
                raise Violation("a client waits for ever")
        deadline = loop.time() + _SETTLE_SECONDS
        while not world.is_idle() and loop.time() < deadline:
            await asyncio.sleep(1.0)
            self._raise(clients)
        for client in self._clients:
            client.check()
        world.check_finished()

    def _raise(self, clients: list[asyncio.Task[None]]) -> None:
        if self._world.violations:
            raise self._world.violations[0]
        for client in clients:
            if client.done() and (error := client.exception()) is not None:
                raise error

    async def _disturb(self) -> None:
        """Faults between any two messages."""
        rng, world = self._rng, self._world
        for _ in range(self._schedule.faults):
            await asyncio.sleep(rng.expovariate(1 / _FAULT_SECONDS))
            if rng.random() < 0.5 and world.processes:
                world.kill(rng.choice(sorted(world.processes)))
            elif streams := list(self._network.streams):
                stream = rng.choice(streams)
                world.say(f"a stream of {stream.client.name} breaks: {stream.path}")
                self._breaks += 1
                stream.cut()

    async def _look(self) -> None:
        seen = 0
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            if seen != self._network.messages:
                seen = self._network.messages
                self._world.check()

    def _end(self) -> None:
        """Nobody is left to do anything."""
        self._world.over = True
        while tasks := asyncio.all_tasks(self._loop):
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def _outcome(self) -> Outcome:
        world, counts = self._world, self._world.counts
        return Outcome(
            manager_deaths=counts["manager"],
            executor_deaths=counts["executor"],
            frontend_deaths=counts["frontend"],
            client_deaths=sum(client.lives - 1 for client in self._clients),
            broken_streams=self._breaks,
            messages=self._network.messages,
            lost_messages=self._network.lost,
            taken_over=sum(client.taken_over for client in self._clients),
            tokens=sum(client.heard.count for client in self._clients),
            preemptions=world.preemptions,
            refused=sum(client.refused for client in self._clients),
            checks=counts["checks"],
        )
