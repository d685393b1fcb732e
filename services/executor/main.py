"""The executor process: takes the lock, loads the model, attaches, serves frontends, runs steps.

Exit codes: 0 asked to stop; 1 a fault, or another executor has taken over: starting again may help;
78 the settings fit neither the model, nor the machine, nor the pool there: it will not.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import threading
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, Final

import grpc
import numpy as np
import structlog
import uvloop

from kernels.cpu.native import available_isas
from kvmanager.geometry import asked_geometry, asked_place, difference, read_fingerprint, read_geometry, read_place
from kvmanager.layout import HEADER_WORDS
from pagehold.executor.v1 import executor_pb2_grpc as ex_grpc
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime import failpoint, logs
from pagehold.runtime.admin import serve_admin
from pagehold.runtime.channel import server_options
from pagehold.runtime.progress import Progress, State
from pagehold.runtime.protocol import PROTOCOL
from pagehold.runtime.settings import ExecutorSettings
from pagehold.runtime.statedir import StateDir, StateDirError
from services.executor.backend import Backend, ConfigurationError, HostBackend, PoolGone
from services.executor.engine import Engine
from services.executor.frontends import Frontends
from services.executor.inbox import Attached, Inbox, Replied, Stop
from services.executor.kv_link import KvLink
from services.executor.modelstore.store import ModelError, PackedModel, Weights, open_model
from services.executor.pages import Pages
from services.executor.requests import Requests
from services.executor.scheduler import Scheduler
from services.executor.server import Description, ExecutorServicer
from services.executor.shared import SharedPool
from services.executor.tenure import Tenure
from services.executor.trace import StepTrace, TracedEngine

log = structlog.get_logger()

EXIT_FAULT: Final = 1  # starting again may help
EXIT_CONFIG: Final = 78  # EX_CONFIG: starting again will not help
_PARK_AFTER: Final = 256  # unread tokens of a detached output
_STOP_SECONDS: Final = 0.2
_PORT_SECONDS: Final = 2.0  # a lock is free before the last socket of the one that held it is
_PORT_POLL_SECONDS: Final = 0.02


def main(settings: ExecutorSettings) -> int:
    """Runs until SIGTERM. Returns the exit code."""
    logs.configure("executor", settings.log_level)
    try:
        failpoint.arm(settings.failpoints)
        state = StateDir.prepare(settings.state_dir)
        failpoint.arm_once(state.failpoints("executor"))
        tenure = Tenure(state, settings.hang_seconds)
        require_device(settings)
        model = open_weights(settings)
        executor = _Executor(settings, state, tenure, model)
    except (ConfigurationError, ModelError, StateDirError, failpoint.FailpointSyntaxError) as error:
        return _refuse(str(error), EXIT_CONFIG)
    except OSError as error:
        return _refuse(f"cannot start on {settings.state_dir}: {error.strerror or error}", EXIT_FAULT)
    return uvloop.run(executor.run())


def _refuse(message: str, code: int) -> int:
    print(f"pagehold executor: {message}", file=sys.stderr)
    return code


class _Executor:
    def __init__(self, settings: ExecutorSettings, state: StateDir, tenure: Tenure, model: PackedModel) -> None:
        self._settings = settings
        self._state = state
        self._tenure = tenure
        self._model = model
        self._max_model_len = _max_model_len(settings, model)
        self._kv_dtype = settings.kv_dtype or settings.dtype
        self._pool = SharedPool(state)
        self._inbox = Inbox()
        self._backend = make_backend(settings, model, self._max_model_len, state, self._pool, self._inbox)
        self._trace = _open_trace(settings)
        self._fatal: kv.Error | None = None
        self._failed = False
        self._done = asyncio.Event()
        self._attached = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._done.set)
        # Before anything writable is mapped: holding the lock proves that earlier writers are dead.
        if not self._tenure.is_held and (different := self._differs_from_pool()):
            return _refuse(different, EXIT_CONFIG)
        if not self._tenure.is_held:
            # A standby has time now, and none later.
            self._model.populate()
            gc.collect()
            gc.freeze()
        if not await self._unless_done(self._tenure.wait()):
            self._tenure.progress.set_state(State.DOWN)
            return 0
        progress = self._tenure.progress
        try:
            request = self._attach_request(self._tenure.id)
            request.pool_bytes = self._backend.pool_bytes(request)
        except ConfigurationError as error:
            return _refuse(str(error), EXIT_CONFIG)
        link = KvLink(
            f"unix:{self._state.kvmanager_socket}",
            lambda: self._backend.prepared(request),
            lambda response: self._on_attach(response, loop),
            lambda call, reply: self._inbox.put(Replied(call, reply)),
            self._on_fatal,
            self._settings.hang_seconds,
        )
        engine = self._make_engine(link, loop, progress)
        linking = asyncio.create_task(link.run())
        linking.add_done_callback(self._on_link_ended)
        stepping = threading.Thread(target=self._run_engine, args=(engine, loop), name="step", daemon=True)
        stepping.start()
        if await self._unless_done(self._attached.wait()):
            await self._serve_until_done(engine, progress, stepping)
        else:
            await self._stop_stepping(stepping)
        linking.cancel()
        progress.set_state(State.DOWN)
        return self._exit_code()

    def _differs_from_pool(self) -> str:
        """Why this executor could never take over from the one that runs; empty when it could."""
        try:
            header = np.fromfile(self._state.tables, np.uint64, HEADER_WORDS)
            there, place = read_geometry(header), read_place(header)
        except (OSError, ValueError, IndexError):
            return ""  # no pool yet
        request = self._attach_request(b"")
        asked, wanted = asked_geometry(request), asked_place(request)
        different = difference(there, read_fingerprint(header), asked, self._model.fingerprint, place, wanted)
        if not different:
            return ""
        return (
            f"the executor that runs on {self._state.root} serves another {different}; "
            "choose another --state-dir, or the same model and flags"
        )

    async def _serve_until_done(self, engine: Engine, progress: Progress, stepping: threading.Thread) -> None:
        try:
            server, servicer = await self._serve(engine)
        except ConfigurationError as error:
            self._on_fatal(kv.Error(reason=kv.ERROR_REASON_INVALID, message=str(error)))
            await self._stop_stepping(stepping)
            return
        progress.set_state(State.READY)
        log.info("ready", epoch=self._pool.epoch, pages=self._pool.pages - 1, model=self._model.name)
        await self._done.wait()
        progress.set_state(State.DRAINING)
        await self._stop_stepping(stepping)
        servicer.close()
        await server.stop(_STOP_SECONDS)

    async def _stop_stepping(self, stepping: threading.Thread) -> None:
        """Whoever closes the runner must not meet a thread that still uses it."""
        self._inbox.put(Stop())
        await asyncio.to_thread(stepping.join)

    async def _unless_done(self, wanted: Coroutine[Any, Any, object]) -> bool:
        """Waits for `wanted`. False when the process is to stop first. Raises what `wanted` raises."""
        tasks = [asyncio.create_task(wanted), asyncio.create_task(self._done.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        if self._done.is_set():
            return False
        await tasks[0]
        return True

    def _exit_code(self) -> int:
        if self._failed:
            return EXIT_FAULT
        if self._fatal is not None:
            lasting = (kv.ERROR_REASON_WRONG_MODEL, kv.ERROR_REASON_NO_MEMORY, kv.ERROR_REASON_INVALID)
            return _refuse(self._fatal.message, EXIT_CONFIG if self._fatal.reason in lasting else EXIT_FAULT)
        self._backend.close()
        return 0

    def _attach_request(self, executor_id: bytes) -> kv.AttachRequest:
        settings, spec = self._settings, self._model.spec
        request = kv.AttachRequest(
            executor_id=executor_id,
            fingerprint=self._model.fingerprint,
            geometry=kv.Geometry(
                layers=spec.layers,
                kv_heads=spec.kv_heads,
                head_dim=spec.head_dim,
                page_size=settings.page_size,
                kv_dtype=self._kv_dtype,
                max_model_len=self._max_model_len,
                # Rows come back a turn after their sequence left, hence twice as many.
                rows=2 * settings.max_num_seqs,
            ),
            prefix_cache=settings.prefix_cache,
            protocol=PROTOCOL,
        )
        self._backend.describe(request)
        return request

    def _make_engine(self, link: KvLink, loop: asyncio.AbstractEventLoop, progress: Progress) -> Engine:
        settings, runner = self._settings, self._backend.runner
        most = self._backend.max_batch_tokens
        if runner.drafts is not None:
            runner.drafts = runner.drafts.within(most) if settings.speculation == "ngram" else None
        scheduler = Scheduler(settings.page_size, settings.max_num_seqs, most, _PARK_AFTER, runner.drafts)
        requests = Requests(scheduler, self._pool, runner, self._state.records, self._model.eos_token_ids)
        frontends = Frontends(requests, self._pool, settings.prefix_cache)
        pages = Pages(scheduler, requests, runner, self._pool, settings.prefix_cache, settings.fork)

        def send(calls: list[kv.Call]) -> None:
            loop.call_soon_threadsafe(link.send, calls)

        parts = (runner, scheduler, requests, frontends, pages, self._inbox, send, progress)
        options: dict[str, Any] = {
            "hang_seconds": settings.hang_seconds,
            "stream_interval": settings.stream_interval_ms / 1000,
        }
        if self._trace is None:
            return Engine(*parts, **options)
        return TracedEngine(self._trace, *parts, **options)

    def _on_attach(self, response: kv.AttachResponse, loop: asyncio.AbstractEventLoop) -> None:
        try:
            map_pool = self._backend.attached(response)
        except ConfigurationError as error:
            self._on_fatal(kv.Error(reason=kv.ERROR_REASON_INVALID, message=str(error)))
            return
        except PoolGone as gone:
            self._on_fatal(kv.Error(message=str(gone)))
            return

        def open_pool() -> None:
            map_pool()
            loop.call_soon_threadsafe(self._attached.set)

        self._inbox.put(Attached(response, open_pool))

    def _on_fatal(self, error: kv.Error) -> None:
        self._fatal = error
        self._done.set()

    def _on_link_ended(self, linking: asyncio.Task[None]) -> None:
        error = linking.exception() if not linking.cancelled() else None
        if isinstance(error, ConfigurationError):
            self._on_fatal(kv.Error(reason=kv.ERROR_REASON_INVALID, message=str(error)))
        elif error is not None:
            log.error("the manager's stream failed", exc_info=error)
            self._fail()

    def _run_engine(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        try:
            engine.run()
        except BaseException:
            # A fault in a step is not survived: the next executor goes on from the logs.
            log.exception("step failed")
            loop.call_soon_threadsafe(self._fail)

    def _fail(self) -> None:
        self._failed = True
        self._done.set()

    async def _serve(self, engine: Engine) -> tuple[grpc.aio.Server, ExecutorServicer]:
        settings = self._settings
        description = Description(
            model=self._model,
            served_model_name=settings.served_model_name or self._model.name,
            max_model_len=self._max_model_len,
            device=self._backend.device,
            dtype=settings.dtype,
            kv_dtype=self._kv_dtype,
            deterministic=self._backend.runner.deterministic,
            speculation="off" if self._backend.runner.drafts is None else settings.speculation,
        )
        afar = settings.executor_listen
        server = grpc.aio.server(options=server_options(settings.hang_seconds if afar else None))
        servicer = ExecutorServicer(description, self._pool, engine, self._inbox)
        ex_grpc.add_ExecutorServiceServicer_to_server(servicer, server)
        serve_admin(server)
        # The lock is held, so whoever left a socket here is dead.
        self._state.executor_socket.unlink(missing_ok=True)
        server.add_insecure_port(f"unix:{self._state.executor_socket}")
        if afar:
            await _listen(server, afar)
        await server.start()
        return server, servicer


async def _listen(server: grpc.aio.Server, address: str) -> None:
    """On a TCP port; that of a predecessor that has just died is waited for. Raises ConfigurationError."""
    give_up = time.monotonic() + _PORT_SECONDS
    while True:
        try:
            if server.add_insecure_port(address):
                return
        except RuntimeError:
            pass
        if time.monotonic() > give_up:
            raise ConfigurationError(
                f"cannot listen on {address}: in use or not allowed; choose another --executor-listen"
            )
        await asyncio.sleep(_PORT_POLL_SECONDS)


def _max_model_len(settings: ExecutorSettings, model: PackedModel) -> int:
    longest = model.spec.max_position_embeddings
    if settings.max_model_len is not None and settings.max_model_len > longest:
        raise ConfigurationError(f"--max-model-len {settings.max_model_len} is more than the model's {longest}")
    return settings.max_model_len or longest


def _open_trace(settings: ExecutorSettings) -> StepTrace | None:
    if settings.step_trace is None:
        return None
    try:
        return StepTrace(settings.step_trace)
    except OSError as error:
        raise ConfigurationError(f"--step-trace {settings.step_trace}: {error.strerror}") from error


def _on_cuda(settings: ExecutorSettings) -> bool:
    """Imports nothing of CUDA unless it may be used."""
    from services.executor import cuda_backend

    return settings.device == "cuda" or (settings.device == "auto" and cuda_backend.is_there())


def require_device(settings: ExecutorSettings) -> None:
    """Before a model is converted for it, which can take minutes. Raises ConfigurationError."""
    if _on_cuda(settings):
        from services.executor import cuda_backend

        cuda_backend.require_gpu(settings)


def open_weights(settings: ExecutorSettings) -> PackedModel:
    """The model, packed as the settings or the machine want it. Raises ConfigurationError, ModelError."""
    model, *compact = (open_model(settings.model, weights=weights) for weights in wanted_weights(settings))
    if compact and compact[0].folder != model.folder:
        return replace(model, compact=compact[0])
    return model


def wanted_weights(settings: ExecutorSettings) -> tuple[Weights, ...]:
    """How the model's matrices are packed: for all steps, and maybe again for those of few tokens.

    Raises ConfigurationError.
    """
    if _on_cuda(settings) or settings.runner == "reference":
        if settings.weights not in ("auto", "bfloat16"):
            raise ConfigurationError(f"--weights {settings.weights} is for CPUs; leave it out, or set --device cpu")
        return (Weights.BFLOAT16,)
    isa = (settings.cpu_isa or available_isas()[-1]) if settings.dtype == "bfloat16" else "any"
    if settings.weights == "int4":
        return (Weights.INT4 if isa == "amx" else Weights.INT4_INTEGERS,)  # tiles would wait for each block's scales
    if settings.weights != "auto":
        return (Weights(settings.weights),)
    if isa == "amx":
        return (Weights.FILE,)
    # Blocks are expanded on the way. Beside tiles that is free; with vdpbf16ps alone it pays while reading bfloat16
    # would take longer than multiplying, which is for few rows.
    return (Weights.BFLOAT16, Weights.FILE) if isa == "avx512bf16" else (Weights.BFLOAT16,)


def make_backend(
    settings: ExecutorSettings,
    model: PackedModel,
    max_model_len: int,
    state: StateDir,
    pool: SharedPool,
    inbox: Inbox,
) -> Backend:
    """The one that the settings name. Raises ConfigurationError."""
    if _on_cuda(settings):
        from services.executor import cuda_backend

        return cuda_backend.CudaBackend(settings, model, max_model_len, state, pool, inbox)
    return HostBackend(settings, model, state, pool)
