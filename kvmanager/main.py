"""The kvmanager process: takes manager.lock, adopts, serves until SIGTERM. Shared state stays.

Exit codes: 0 asked to stop; 1 a fault, or another manager is alive: starting again may help;
78 the shared files cannot be adopted: it will not.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from typing import Final

import grpc
import structlog
import uvloop

from kvmanager import pool as pools
from kvmanager.pool import CannotAdopt
from kvmanager.service import Manager
from kvmanager.session import KvManagerServicer
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from pagehold.runtime import failpoint, logs
from pagehold.runtime.channel import server_options
from pagehold.runtime.lock import FileLock, LockBusy
from pagehold.runtime.progress import Progress, State
from pagehold.runtime.settings import KvManagerSettings
from pagehold.runtime.statedir import StateDir, StateDirError

log = structlog.get_logger()

EXIT_FAULT: Final = 1
EXIT_CONFIG: Final = 78  # EX_CONFIG
_SWEEP_SECONDS: Final = 0.05
_SLOWEST_SWEEP_SECONDS: Final = 0.4  # when nothing happens
_STOP_SECONDS: Final = 0.2


def main(settings: KvManagerSettings) -> int:
    """Runs until SIGTERM. Returns the exit code."""
    logs.configure("kvmanager", settings.log_level)
    try:
        failpoint.arm(settings.failpoints)
        state = StateDir.prepare(settings.state_dir)
        lock = FileLock(state.manager_lock)  # never released: the process's end does it
        lock.acquire()
    except LockBusy:
        return _refuse(
            f"another kvmanager serves {settings.state_dir}; stop it or choose another --state-dir", EXIT_FAULT
        )
    except (StateDirError, failpoint.FailpointSyntaxError) as error:
        return _refuse(str(error), EXIT_CONFIG)
    try:
        if settings.discard:
            _discard(state)
        progress = Progress(state.progress("kvmanager"))
        manager = Manager(state, settings.record_quota, settings.record_ttl, failpoint.hit)
    except CannotAdopt as error:
        return _refuse(str(error), EXIT_CONFIG)
    except OSError as error:
        return _refuse(f"cannot use the files in {state.root}: {error.strerror}", EXIT_FAULT)
    return uvloop.run(_serve(state, manager, progress))


def _refuse(message: str, code: int) -> int:
    print(f"pagehold kvmanager: {message}", file=sys.stderr)
    return code


def _discard(state: StateDir) -> None:
    executor = FileLock(state.executor_lock)
    try:
        executor.acquire()
    except LockBusy:
        raise CannotAdopt(f"an executor still uses {state.root}; stop it before --discard") from None
    try:
        pools.discard(state)
    finally:
        executor.release()


async def _serve(state: StateDir, manager: Manager, progress: Progress) -> int:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[int] = loop.create_future()

    def finish(code: int) -> None:
        if not done.done():
            done.set_result(code)

    def fail(error: Exception) -> None:
        log.error("fault; the next manager adopts the shared files", exc_info=error)
        finish(EXIT_FAULT)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, finish, 0)
    servicer = KvManagerServicer(manager, progress, fail)
    server = grpc.aio.server(options=server_options())
    kv_grpc.add_KvManagerServiceServicer_to_server(servicer, server)
    # The lock is held, so whoever left a socket here is dead.
    state.kvmanager_socket.unlink(missing_ok=True)
    server.add_insecure_port(f"unix:{state.kvmanager_socket}")
    await server.start()
    # What was adopted lives as long as the process: the collector need not look at it in a turn.
    gc.freeze()
    progress.set_state(State.READY)
    log.info("serving", state_dir=str(state.root), epoch=manager.epoch)
    sweeping = asyncio.create_task(_sweep(manager, servicer))
    code = await done
    sweeping.cancel()
    progress.set_state(State.DRAINING)
    await server.stop(_STOP_SECONDS)
    progress.set_state(State.DOWN)
    return code


async def _sweep(manager: Manager, servicer: KvManagerServicer) -> None:
    """Seals and expires between turns, the more often the more happens."""
    seconds = _SWEEP_SECONDS
    while True:
        await asyncio.sleep(seconds)
        try:
            sealed = manager.sweep()
        except Exception as error:
            servicer.fail(error)
            return
        busy, servicer.active = sealed or servicer.active, False
        seconds = _SWEEP_SECONDS if busy else min(2 * seconds, _SLOWEST_SWEEP_SECONDS)
