"""The executor process: loads the model, takes the lock, attaches, serves frontends, runs steps."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import threading
from typing import Final

import grpc
import structlog
import uvloop

from pagehold.executor.v1 import executor_pb2_grpc as ex_grpc
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime import failpoint, logs
from pagehold.runtime.channel import server_options
from pagehold.runtime.lock import FileLock
from pagehold.runtime.progress import Progress, State
from pagehold.runtime.settings import ExecutorSettings
from pagehold.runtime.statedir import StateDir, StateDirError
from services.executor.engine import Engine
from services.executor.inbox import Attached, Inbox, Replied, Stop
from services.executor.kv_link import KvLink
from pagehold.runtime.memory import default_pool_bytes
from services.executor.modelstore.store import ModelError, PackedModel, open_model
from services.executor.pages import Pages
from services.executor.requests import Requests
from services.executor.runner.base import Runner
from services.executor.scheduler import Scheduler
from services.executor.server import Description, ExecutorServicer
from services.executor.shared import SharedPool

log = structlog.get_logger()

EXIT_CONFIG: Final = 78  # EX_CONFIG: starting again will not help
_PARK_AFTER: Final = 256  # unread tokens of a detached output
_LAYOUT_ID: Final = 1


class ConfigurationError(Exception):
    """The settings do not fit the model or the machine; the message says what to do."""


def main(settings: ExecutorSettings) -> int:
    """Runs until SIGTERM. Returns the exit code."""
    logs.configure("executor", settings.log_level)
    failpoint.arm(settings.failpoints)
    try:
        state = StateDir.prepare(settings.state_dir)
        progress = Progress(state.progress("executor"))
        model = open_model(settings.model)
        return uvloop.run(_Executor(settings, state, progress, model).run())
    except (ConfigurationError, ModelError, StateDirError) as error:
        print(f"pagehold executor: {error}", file=sys.stderr)
        return EXIT_CONFIG


class _Executor:
    def __init__(self, settings: ExecutorSettings, state: StateDir, progress: Progress, model: PackedModel) -> None:
        self._settings = settings
        self._state = state
        self._progress = progress
        self._model = model
        self._max_model_len = _max_model_len(settings, model)
        self._kv_dtype = settings.kv_dtype or settings.dtype
        self._runner = make_runner(settings, model, self._max_model_len)
        self._lock = FileLock(state.executor_lock)
        self._pool = SharedPool(state)
        self._inbox = Inbox()
        self._fatal: kv.Error | None = None
        self._done = asyncio.Event()
        self._attached = asyncio.Event()
        self._failure: BaseException | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._done.set)
        # Before anything writable is mapped: holding the lock proves that earlier writers are dead.
        await asyncio.to_thread(self._lock.acquire, True)
        executor_id = secrets.token_bytes(16)
        self._lock.write_id(executor_id)
        link = KvLink(
            f"unix:{self._state.kvmanager_socket}",
            self._attach_request(executor_id),
            self._on_attach,
            lambda call, reply: self._inbox.put(Replied(call, reply)),
            self._on_fatal,
        )
        engine = self._make_engine(link, loop)
        linking = asyncio.create_task(link.run())
        await self._first_of(self._attached, self._done)
        server: grpc.aio.Server | None = None
        thread = threading.Thread(target=self._run_engine, args=(engine, loop), name="step", daemon=True)
        if self._attached.is_set():
            thread.start()
            server = await self._serve(engine)
            self._progress.set_state(State.READY)
            log.info("ready", epoch=self._pool.epoch, pages=self._pool.pages - 1, model=self._model.name)
            await self._done.wait()
            self._progress.set_state(State.DRAINING)
            self._inbox.put(Stop())
            await asyncio.to_thread(thread.join)
            await server.stop(0.2)
        linking.cancel()
        self._progress.set_state(State.DOWN)
        return self._exit_code()

    def _exit_code(self) -> int:
        if self._failure is not None:
            raise self._failure
        if self._fatal is not None:
            print(f"pagehold executor: {self._fatal.message}", file=sys.stderr)
            lasting = (kv.ERROR_REASON_WRONG_MODEL, kv.ERROR_REASON_NO_MEMORY, kv.ERROR_REASON_INVALID)
            return EXIT_CONFIG if self._fatal.reason in lasting else 1
        self._runner.close()
        return 0

    def _attach_request(self, executor_id: bytes) -> kv.AttachRequest:
        settings, spec = self._settings, self._model.spec
        return kv.AttachRequest(
            executor_id=executor_id,
            fingerprint=self._model.fingerprint,
            geometry=kv.Geometry(
                layers=spec.layers,
                kv_heads=spec.kv_heads,
                head_dim=spec.head_dim,
                page_size=settings.page_size,
                kv_dtype=self._kv_dtype,
                layout_id=_LAYOUT_ID,
                max_model_len=self._max_model_len,
                # Rows come back a turn after their sequence left, hence twice as many.
                rows=2 * settings.max_num_seqs,
            ),
            pool_bytes=settings.kv_memory or default_pool_bytes(self._state.root, settings.memory_fraction),
            prefix_cache=settings.prefix_cache,
        )

    def _make_engine(self, link: KvLink, loop: asyncio.AbstractEventLoop) -> Engine:
        settings = self._settings
        scheduler = Scheduler(settings.page_size, settings.max_num_seqs, settings.max_batch_tokens, _PARK_AFTER)
        requests = Requests(scheduler, self._pool, self._runner, self._state.records, self._model.eos_token_ids)
        pages = Pages(scheduler, requests, self._runner, self._pool, settings.prefix_cache)

        def send(calls: list[kv.Call]) -> None:
            loop.call_soon_threadsafe(link.send, calls)

        return Engine(self._runner, scheduler, requests, pages, self._inbox, send, self._progress)

    def _on_attach(self, response: kv.AttachResponse) -> None:
        if not self._pool.mapped:
            self._runner.map_pool(self._pool.map(), self._pool.pages, self._pool.page_size)
        elif not self._pool.still_the_same():
            # The manager started afresh: every page and log that this process maps is gone.
            self._on_fatal(kv.Error(message="the manager has another pool now; starting again"))
            return
        self._inbox.put(Attached(response))
        self._attached.set()

    def _on_fatal(self, error: kv.Error) -> None:
        self._fatal = error
        self._done.set()

    def _run_engine(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        try:
            engine.run()
        except BaseException as error:
            # A fault in a step is not survived: the next executor goes on from the logs.
            log.exception("step failed")
            self._failure = error
            loop.call_soon_threadsafe(self._done.set)

    async def _serve(self, engine: Engine) -> grpc.aio.Server:
        settings = self._settings
        description = Description(
            model=self._model,
            served_model_name=settings.served_model_name or self._model.name,
            max_model_len=self._max_model_len,
            device="cpu",
            dtype=settings.dtype,
            kv_dtype=self._kv_dtype,
            deterministic=self._runner.deterministic,
        )
        server = grpc.aio.server(options=server_options())
        servicer = ExecutorServicer(description, self._pool, engine, self._inbox)
        ex_grpc.add_ExecutorServiceServicer_to_server(servicer, server)
        # The lock is held, so whoever left a socket here is dead.
        self._state.executor_socket.unlink(missing_ok=True)
        server.add_insecure_port(f"unix:{self._state.executor_socket}")
        await server.start()
        return server

    @staticmethod
    async def _first_of(*events: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()) for event in events]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()


def _max_model_len(settings: ExecutorSettings, model: PackedModel) -> int:
    longest = model.spec.max_position_embeddings
    if settings.max_model_len is not None and settings.max_model_len > longest:
        raise ConfigurationError(f"--max-model-len {settings.max_model_len} is more than the model's {longest}")
    return settings.max_model_len or longest


def make_runner(settings: ExecutorSettings, model: PackedModel, max_model_len: int) -> Runner:
    """The runner that the settings name. Imports only the one that is used."""
    kv_dtype = settings.kv_dtype or settings.dtype
    if settings.device == "cuda":
        raise ConfigurationError("--device cuda: this version runs on CPUs only; use --device cpu")
    if settings.runner == "reference":
        from services.executor.runner.reference import ReferenceRunner

        return ReferenceRunner(model, settings.dtype, kv_dtype)
    from services.executor.runner.cpu import CpuRunner

    threads = settings.threads or len(os.sched_getaffinity(0))
    return CpuRunner(model, settings.dtype, kv_dtype, threads, settings.cpu_isa)
