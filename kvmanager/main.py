"""The kvmanager process: takes manager.lock, adopts, serves until SIGTERM. Shared state stays.

Exit codes: 0 asked to stop; 1 a fault, or another manager is alive: starting again may help;
78 the shared files cannot be adopted: it will not.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from functools import partial
from typing import Final

import grpc
import structlog
import uvloop

from kvmanager.device.leash import Leash
from kvmanager.device.memory import Exporter, load_driver
from kvmanager.idle import IdleCheck
from kvmanager.layout import PoolKind
from kvmanager.pool import CannotAdopt
from kvmanager.service import Manager
from kvmanager.session import KvManagerServicer
from kvmanager.vacant import discard
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from pagehold.runtime import failpoint, logs
from pagehold.runtime.admin import serve_admin
from pagehold.runtime.channel import server_options
from pagehold.runtime.heartbeat import Heartbeat
from pagehold.runtime.lock import LOOK_SECONDS, FileLock, LockBusy
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
        failpoint.arm_once(state.failpoints("kvmanager"))
        if settings.discard:
            discard(state)
        lock = FileLock(state.manager_lock)  # never released: the process's end does it
        lock.acquire(patience=LOOK_SECONDS)
    except LockBusy:
        return _refuse(
            f"another kvmanager serves {settings.state_dir}; stop it or choose another --state-dir", EXIT_FAULT
        )
    except (StateDirError, failpoint.FailpointSyntaxError) as error:
        return _refuse(str(error), EXIT_CONFIG)
    try:
        progress = Progress(state.progress("kvmanager"))
        Heartbeat(progress, settings.hang_seconds)
        exporter = partial(_exporter, settings.cuda_driver)
        manager = Manager(state, settings.record_quota, settings.record_ttl, failpoint.hit, exporter=exporter)
    except CannotAdopt as error:
        return _refuse(str(error), EXIT_CONFIG)
    except OSError as error:
        return _refuse(f"cannot use the files in {state.root}: {error.strerror}", EXIT_FAULT)
    return uvloop.run(_serve(settings, state, manager, progress))


def _exporter(driver: str, kind: PoolKind) -> Exporter:
    """Loaded only for a pool on a device."""
    return load_driver(driver).exporter(kind)


def _refuse(message: str, code: int) -> int:
    print(f"pagehold kvmanager: {message}", file=sys.stderr)
    return code


async def _serve(settings: KvManagerSettings, state: StateDir, manager: Manager, progress: Progress) -> int:
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
    leash = Leash(state.leash_socket)
    servicer = KvManagerServicer(manager, progress, fail, leash, settings.hang_seconds)
    server = grpc.aio.server(options=server_options())
    kv_grpc.add_KvManagerServiceServicer_to_server(servicer, server)
    serve_admin(server)
    # Before the other socket: whoever reaches that one has been able to greet.
    leash.start()
    # The lock is held, so whoever left a socket here is dead.
    state.kvmanager_socket.unlink(missing_ok=True)
    server.add_insecure_port(f"unix:{state.kvmanager_socket}")
    await server.start()
    # What was adopted lives as long as the process: the collector need not look at it in a turn.
    gc.freeze()
    progress.set_state(State.READY)
    log.info("serving", state_dir=str(state.root), epoch=manager.epoch)
    between_calls = [
        asyncio.create_task(_sweep(manager, servicer, progress, settings.hang_seconds)),
        asyncio.create_task(_check(manager, servicer, progress)),
    ]
    code = await done
    for task in between_calls:
        task.cancel()
    progress.end_turn()
    progress.set_state(State.DRAINING)
    await server.stop(_STOP_SECONDS)
    leash.close()
    progress.set_state(State.DOWN)
    return code


async def _sweep(manager: Manager, servicer: KvManagerServicer, progress: Progress, hang_seconds: float) -> None:
    """Seals and expires between turns, the more often the more happens."""
    seconds, seen = _SWEEP_SECONDS, servicer.changes
    while True:
        progress.begin_turn(hang_seconds + seconds)
        await asyncio.sleep(seconds)
        try:
            sealed = manager.sweep()
        except Exception as error:
            servicer.fail(error)
            return
        servicer.changes += sealed
        seconds = _SWEEP_SECONDS if servicer.changes != seen else min(2 * seconds, _SLOWEST_SWEEP_SECONDS)
        seen = servicer.changes


async def _check(manager: Manager, servicer: KvManagerServicer, progress: Progress) -> None:
    """Looks for contradictions while nothing happens."""
    check = IdleCheck(lambda: manager.core, lambda: servicer.changes)
    while True:
        try:
            seconds = check.work()
        except Exception as error:
            log.error("the check between calls cannot be made", exc_info=error)
            return
        servicer.findings = check.findings
        progress.set_findings(check.findings)
        await asyncio.sleep(seconds)
