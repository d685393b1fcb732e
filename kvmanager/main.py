"""The kvmanager process: takes manager.lock, adopts, serves until SIGTERM. Shared state stays."""

from __future__ import annotations

import asyncio
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

EXIT_CONFIG: Final = 78  # EX_CONFIG: starting again will not help
_SWEEP_SECONDS: Final = 0.05


def main(settings: KvManagerSettings) -> int:
    """Runs until SIGTERM. Returns the exit code."""
    logs.configure("kvmanager", settings.log_level)
    failpoint.arm(settings.failpoints)
    try:
        state = StateDir.prepare(settings.state_dir)
        lock = FileLock(state.manager_lock)
        try:
            lock.acquire()
        except LockBusy:
            raise CannotAdopt(f"another kvmanager serves {state.root}; stop it or choose another --state-dir") from None
        if settings.discard:
            _discard(state)
        progress = Progress(state.progress("kvmanager"))
        manager = Manager(state, settings.record_quota, settings.record_ttl, failpoint.hit)
        return uvloop.run(_serve(state, manager, progress))
    except (CannotAdopt, StateDirError) as error:
        print(f"pagehold kvmanager: {error}", file=sys.stderr)
        return EXIT_CONFIG


def _discard(state: StateDir) -> None:
    executor = FileLock(state.executor_lock)
    try:
        executor.acquire()
    except LockBusy:
        raise CannotAdopt(f"an executor still uses {state.root}; stop it before --discard") from None
    pools.discard(state)
    executor.release()


async def _serve(state: StateDir, manager: Manager, progress: Progress) -> int:
    server = grpc.aio.server(options=server_options())
    kv_grpc.add_KvManagerServiceServicer_to_server(KvManagerServicer(manager), server)
    # The lock is held, so whoever left a socket here is dead.
    state.kvmanager_socket.unlink(missing_ok=True)
    server.add_insecure_port(f"unix:{state.kvmanager_socket}")
    done = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, done.set)
    await server.start()
    progress.set_state(State.READY)
    log.info("serving", state_dir=str(state.root), epoch=manager.epoch)
    sweeping = asyncio.create_task(_sweep(manager))
    waiting = asyncio.create_task(done.wait())
    finished, _ = await asyncio.wait((sweeping, waiting), return_when=asyncio.FIRST_COMPLETED)
    progress.set_state(State.DRAINING)
    await server.stop(0.2)
    progress.set_state(State.DOWN)
    if sweeping in finished:
        sweeping.result()  # raises what ended it
    return 0


async def _sweep(manager: Manager) -> None:
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        manager.sweep()
