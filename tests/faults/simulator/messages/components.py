"""The three components, each in a process that can die: the product's classes, wired as their `main` does it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from kvmanager.memory import Memory
from kvmanager.pool import Pool as PoolFiles
from kvmanager.service import Manager
from kvmanager.session import KvManagerServicer
from pagehold.executor.v1 import executor_pb2_grpc as ex_grpc
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from pagehold.runtime.lock import FileLock
from pagehold.runtime.progress import Progress
from pagehold.runtime.statedir import StateDir
from pagehold.v1 import inference_pb2_grpc as api_grpc
from services.executor.engine import Engine
from services.executor.frontends import Frontends
from services.executor.inbox import Attached, Event, Inbox, Replied
from services.executor.kv_link import KvLink
from services.executor.pages import Pages
from services.executor.requests import Requests
from services.executor.runner.base import DraftLimits
from services.executor.scheduler import Scheduler
from services.executor.server import Description, ExecutorServicer
from services.executor.shared import SharedPool
from services.frontend.errors import ErrorGuard
from services.frontend.inference import InferenceServicer
from services.frontend.link import ExecutorLink
from services.frontend.tally import Tally
from tests.faults.simulator.faults import Killed
from tests.faults.simulator.invariants import Pool
from tests.faults.simulator.messages.calls import Server
from tests.faults.simulator.messages.loop import Process
from tests.faults.simulator.messages.network import Network
from tests.faults.simulator.messages.requests import FINGERPRINT, MAX_MODEL_LEN, SHAPE
from tests.faults.simulator.messages.runner import ModelRunner

FRONTEND_ADDRESS = "frontend"
EXECUTOR_ADDRESS = "executor"

_QUOTA = 1 << 24
_TTL = 600.0
_SWEEP_SECONDS = 0.01
_SLOWEST_SWEEP_SECONDS = 1.0
_STEP_SECONDS = (0.0005, 0.004)
_IDLE_SECONDS = 1.0
_PAGE_BYTES = 2 * 32 * SHAPE.page_size * 2  # one layer, one head of 32, bfloat16

_DRAFTS: Final = DraftLimits(each=5, rows=16, granted=24)

Hit = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a schedule draws of the product's settings."""

    pages: int
    max_num_seqs: int
    max_batch_tokens: int
    park_after: int
    prefix_cache: bool
    fork: bool
    depth: int  # of the runner
    drafts: bool  # it has some; only with depth 0


class DyingManager(Manager):
    """Its shared stores go through a memory that may die."""

    def __init__(self, memory: Memory, *settings: Any) -> None:
        self._memory = memory
        super().__init__(*settings)

    def _build(self, pool: PoolFiles) -> Any:
        built = super()._build(pool)
        core = self.core
        assert core is not None
        for part in (core, *vars(core).values()):
            if hasattr(part, "_memory"):
                part._memory = self._memory
        return built


def start_manager(
    network: Network, process: Process, state: StateDir, memory: Memory, hit: Hit, fail: Callable[[Exception], None]
) -> Manager:
    """Adopts what is there, and serves."""
    manager = DyingManager(memory, state, _QUOTA, _TTL, hit, network.loop.time)
    servicer = KvManagerServicer(manager, Progress(state.progress("kvmanager")), fail)
    server = Server(network, process, f"unix:{state.kvmanager_socket}")
    kv_grpc.add_KvManagerServiceServicer_to_server(servicer, server)
    server.start()

    async def sweep() -> None:
        seconds, changes = _SWEEP_SECONDS, servicer.changes
        while True:
            await asyncio.sleep(seconds)
            try:
                sealed = manager.sweep()
            except Killed:
                process.kill()
                return
            busy, changes = sealed or changes != servicer.changes, servicer.changes
            seconds = _SWEEP_SECONDS if busy else min(2 * seconds, _SLOWEST_SWEEP_SECONDS)

    process.serve(sweep())
    return manager


class EventInbox(Inbox):
    """Wakes a task instead of a thread."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        super().put(event)
        self.arrived.set()


class Executor:
    """As `services.executor.main` makes it: lock, link, engine, service."""

    def __init__(
        self,
        network: Network,
        process: Process,
        state: StateDir,
        number: int,
        settings: Settings,
        description: Description,
        pool: Callable[[SharedPool], Pool],
        hit: Hit,
        attached: Callable[[int], None],
    ) -> None:
        """attached(epoch): told of the first attachment."""
        self._on_attach = attached
        self._network = network
        self._process = process
        lock = FileLock(state.executor_lock)
        lock.acquire()  # raises LockBusy: the one before is not dead
        process.on_death.append(lock.release)
        lock.write_id(number.to_bytes(16, "little"))
        self._shared = SharedPool(state)
        drafts = _DRAFTS.within(settings.max_batch_tokens) if settings.drafts else None
        runner = self._runner = ModelRunner(lambda: pool(self._shared), hit, settings.depth, drafts)
        self._inbox = EventInbox()
        clock = network.loop.time
        limits = (settings.max_num_seqs, settings.max_batch_tokens, settings.park_after)
        scheduler = Scheduler(SHAPE.page_size, *limits, drafts)
        requests = self._requests = Requests(scheduler, self._shared, runner, state.records, (), clock)
        frontends = Frontends(requests, self._shared, settings.prefix_cache, clock)
        pages = Pages(scheduler, requests, runner, self._shared, settings.prefix_cache, settings.fork)

        async def attach() -> kv.AttachRequest:
            return _attach_request(number.to_bytes(16, "little"), settings)

        self._link = KvLink(
            f"unix:{state.kvmanager_socket}",
            attach,
            self._attached,
            lambda call, reply: self._inbox.put(Replied(call, reply)),
            lambda error: process.kill(),
        )
        parts = (runner, scheduler, requests, frontends, pages, self._inbox, self._send)
        self.engine = Engine(*parts, Progress(state.progress("executor")), clock)
        self._server = Server(network, process, EXECUTOR_ADDRESS)
        servicer = ExecutorServicer(description, self._shared, self.engine, self._inbox)
        ex_grpc.add_ExecutorServiceServicer_to_server(servicer, self._server)
        process.serve(self._link.run())

    @property
    def has_work(self) -> bool:
        scheduler = self.engine.scheduler
        return bool(scheduler.waiting or scheduler.running)

    def _send(self, calls: list[kv.Call]) -> None:
        for call in calls:
            if call.HasField("close"):
                sequence = self._requests.sequence(call.close.key, call.close.index)
                if sequence is not None:
                    self._runner.check_unused(sequence.lane)
        self._network.loop.call_soon(self._link.send, calls)

    def _attached(self, response: kv.AttachResponse) -> None:
        first = not self._shared.mapped
        if first:
            self._on_attach(response.epoch)
            self._shared.map()
        elif not self._shared.still_the_same():
            self._process.kill()
            return
        self._inbox.put(Attached(response))
        if first:
            self._process.serve(self._run())
            self._server.start()

    async def _run(self) -> None:
        try:
            while True:
                self._inbox.arrived.clear()
                self.engine.handle(self._inbox.take(0))
                if self.engine.step():
                    await asyncio.sleep(self._network.rng.uniform(*_STEP_SECONDS))
                elif not self._inbox.arrived.is_set():
                    await _wait(self._inbox.arrived, _IDLE_SECONDS)
        except Killed:
            self._process.kill()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Until the event, or for so long."""
    handle = asyncio.get_running_loop().call_later(seconds, event.set)
    await event.wait()
    handle.cancel()


def _attach_request(identity: bytes, settings: Settings) -> kv.AttachRequest:
    geometry = kv.Geometry(
        layers=1,
        kv_heads=1,
        head_dim=32,
        page_size=SHAPE.page_size,
        kv_dtype="bfloat16",
        layout_id=1,
        max_model_len=MAX_MODEL_LEN,
        rows=2 * settings.max_num_seqs,
    )
    return kv.AttachRequest(
        executor_id=identity,
        fingerprint=FINGERPRINT,
        geometry=geometry,
        pool_bytes=(settings.pages + 1) * _PAGE_BYTES,
        prefix_cache=settings.prefix_cache,
    )


def start_frontend(network: Network, process: Process) -> None:
    """Open streams are all that it holds."""
    link = ExecutorLink(EXECUTOR_ADDRESS, lambda: None)
    server = Server(network, process, FRONTEND_ADDRESS, (ErrorGuard(),))
    api_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(link, 64, 4096, Tally()), server)
    server.start()
    process.serve(link.run())
