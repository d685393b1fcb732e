"""The frontend process: the public port, and one stream to the executor."""

from __future__ import annotations

import asyncio
import math
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Final

import grpc
import structlog
import uvloop
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from pagehold.runtime import failpoint, logs
from pagehold.runtime.admin import serve_admin
from pagehold.runtime.process import is_alive, is_elsewhere
from pagehold.runtime.progress import Progress, State, read_progress
from pagehold.runtime.settings import FrontendSettings
from pagehold.runtime.statedir import StateDir, StateDirError, frontend_name
from pagehold.v1 import inference_pb2, inference_pb2_grpc
from services.frontend import listener
from services.frontend.errors import ErrorGuard, unavailable
from services.frontend.inference import InferenceServicer
from services.frontend.link import ExecutorLink
from services.frontend.modelinfo import ModelServicer
from services.frontend.tally import Tally, TallyServicer

log = structlog.get_logger()

EXIT_FAULT: Final = 1
EXIT_CONFIG: Final = 78  # EX_CONFIG: starting again will not help
_SERVICES: Final = tuple(service.full_name for service in inference_pb2.DESCRIPTOR.services_by_name.values())
_LOST_SECONDS: Final = 2.0  # an executor that is replaced within this time is no reason to be unready
_GONE_SECONDS: Final = 2.0  # for a process that was killed
_POLL_SECONDS: Final = 0.1
_SHORT_POLL_SECONDS: Final = 0.02
_LAST_SECONDS: Final = 1.0  # to write the last message to every stream
_STOP_SECONDS: Final = 0.5
_ASK_MS: Final = 60_000  # of silence on a connection
_ANSWER_MS: Final = 20_000
_MOST_CONNECTIONS: Final = 1 << 30
_OWN_DESCRIPTORS: Final = 64  # with all connections there, the executor can still be reached again


def main(settings: FrontendSettings) -> int:
    """Runs until SIGTERM. Returns the exit code."""
    logs.configure("frontend", settings.log_level)
    try:
        failpoint.arm(settings.failpoints)
        state = StateDir.prepare(settings.state_dir)
        failpoint.arm_once(state.failpoints("frontend"))
        name = frontend_name(settings.instance)
        if not _is_free(state.progress(name)):
            print(f"pagehold frontend: another {name} runs on {state.root}; choose another --instance", file=sys.stderr)
            return EXIT_CONFIG
        return uvloop.run(_Frontend(settings, state, Progress(state.progress(name))).run())
    except (StateDirError, failpoint.FailpointSyntaxError) as error:
        print(f"pagehold frontend: {error}", file=sys.stderr)
        return EXIT_CONFIG


def _is_free(path: Path) -> bool:
    """Whether no frontend writes this progress; one that is about to be gone is waited for."""
    give_up = time.monotonic() + _GONE_SECONDS
    first = read_progress(path)
    while (view := read_progress(path)) is not None and view.state is not State.DOWN and is_alive(view):
        if time.monotonic() > give_up:
            # The container before this one may have been killed: its turns do not go on.
            return is_elsewhere(view) and view == first
        time.sleep(_POLL_SECONDS)
    return True


def _most_connections() -> int:
    """Beyond them a client is turned away at once, rather than never answered."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(max(limit - _OWN_DESCRIPTORS, 1), _MOST_CONNECTIONS) if limit > 0 else _MOST_CONNECTIONS


class _Frontend:
    def __init__(self, settings: FrontendSettings, state: StateDir, progress: Progress) -> None:
        self._settings = settings
        self._state = state
        self._socket = state.socket_of(frontend_name(settings.instance))
        self._progress = progress
        self._link = ExecutorLink(
            settings.executor or f"unix:{state.executor_socket}", self._changed, settings.hang_seconds
        )
        self._tally = Tally()
        self._inference = InferenceServicer(self._link, settings.max_streams, settings.max_stream_buffer, self._tally)
        self._health = health_aio.HealthServicer()
        self._lost_at = -math.inf  # when the executor was last lost
        self._stops = 0
        self._hands_over = False  # to others on this port
        self._stop = asyncio.Event()
        self._code = 0

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopped)
        loop.add_signal_handler(signal.SIGUSR1, self._handed_over)
        beating = asyncio.create_task(self._beat())
        linking = asyncio.create_task(self._link.run())
        linking.add_done_callback(self._on_link_ended)
        # Those who could be answered by another one are not to meet one that cannot answer yet.
        while self._link.model is None and self._others_serve() and not self._stop.is_set():
            await asyncio.sleep(_SHORT_POLL_SECONDS)
        server = self._server()
        try:
            port = server.add_insecure_port(self._settings.listen)
        except RuntimeError:
            port = 0
        if port == 0:
            print(
                f"pagehold frontend: cannot listen on {self._settings.listen}: in use or not allowed; "
                "choose another --listen",
                file=sys.stderr,
            )
            return EXIT_CONFIG
        self._socket.unlink(missing_ok=True)  # of a dead one
        server.add_insecure_port(f"unix:{self._socket}")
        await self._set_ready(False)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        log.info("listening", address=self._settings.listen)
        watching = asyncio.create_task(self._watch())
        await self._stop.wait()
        watching.cancel()
        await self._drain(server, port)
        linking.cancel()
        beating.cancel()
        self._progress.end_turn()
        self._progress.set_state(State.DOWN)
        return self._code

    def _server(self) -> grpc.aio.Server:
        size = self._settings.max_message_bytes
        server = grpc.aio.server(
            interceptors=[ErrorGuard()],
            options=[
                ("grpc.so_reuseport", int(self._settings.share_port)),
                *self._aging(),
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", size),
                # A long prefill sends nothing: clients that ping every 30 s must not be cut off for it.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # A client whose machine is gone says nothing, for ever: it is asked whether it still lives.
                ("grpc.keepalive_time_ms", _ASK_MS),
                ("grpc.keepalive_timeout_ms", _ANSWER_MS),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.max_allowed_incoming_connections", _most_connections()),
            ],
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self._inference, server)
        inference_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(self._link), server)
        add_HealthServicer_to_server(self._health, server)
        serve_admin(server, TallyServicer(self._tally, self._link))
        if self._settings.reflection:
            names = (*_SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return server

    def _others_serve(self) -> bool:
        """On this port."""
        if not self._settings.share_port:
            return False
        views = map(read_progress, self._state.root.glob("frontend*.progress"))
        return any(view is not None and view.state is State.READY and is_alive(view) for view in views)

    def _aging(self) -> list[tuple[str, int]]:
        """Where frontends come and go, clients are moved on between their calls, before theirs closes."""
        if not self._settings.share_port:
            return []
        return [("grpc.max_connection_age_ms", int(self._settings.connection_age * 1000))]

    def _stopped(self) -> None:
        self._stops += 1
        self._stop.set()

    def _on_link_ended(self, linking: asyncio.Task[None]) -> None:
        """By itself it never does: without it no stream goes on here, and elsewhere all do."""
        error = linking.exception() if not linking.cancelled() else None
        if error is not None:
            log.error("fault; streams go on at the next frontend", exc_info=error)
            self._code, self._stops = EXIT_FAULT, 2
            self._stop.set()

    def _handed_over(self) -> None:
        self._hands_over = self._settings.share_port
        self._stopped()

    def _changed(self) -> None:
        if not self._link.connected:
            self._lost_at = time.monotonic()

    async def _beat(self) -> None:
        """Shows that the event loop turns."""
        while True:
            self._progress.begin_turn(self._settings.hang_seconds)
            await asyncio.sleep(_POLL_SECONDS)

    async def _watch(self) -> None:
        """Readiness follows the executor, but not through every short gap."""
        ready = False
        while True:
            connected = self._link.connected
            if connected != ready and (connected or time.monotonic() - self._lost_at > _LOST_SECONDS):
                ready = connected
                await self._set_ready(ready)
                self._progress.set_state(State.READY if ready else State.STARTING)
                log.info("ready" if ready else "not ready: no executor")
            await asyncio.sleep(_POLL_SECONDS)

    async def _set_ready(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in _SERVICES:
            await self._health.set(name, status)

    async def _drain(self, server: grpc.aio.Server, port: int) -> None:
        """Not ready first; then no new clients; open streams get their time; what is left goes on detached."""
        self._progress.set_state(State.DRAINING)
        await self._health.enter_graceful_shutdown()
        closed = time.monotonic() + self._settings.drain_delay
        while time.monotonic() < closed and self._stops < 2:
            await asyncio.sleep(_SHORT_POLL_SECONDS)
        over = time.monotonic() + self._settings.drain_grace
        if self._hands_over:
            await self._leave(port)
        else:
            # This closes the listener at once; open calls go on.
            asyncio.create_task(server.stop(self._settings.drain_grace + _LAST_SECONDS))
        while self._link.streams and time.monotonic() < over and self._stops < 2:
            await asyncio.sleep(_SHORT_POLL_SECONDS)
        self._inference.draining = True
        for stream in self._link.streams:
            stream.fail(unavailable("this frontend is shutting down; Resume at another"))
        last = time.monotonic() + _LAST_SECONDS
        while self._link.streams and time.monotonic() < last:
            await asyncio.sleep(_SHORT_POLL_SECONDS)
        await server.stop(_STOP_SECONDS)

    async def _leave(self, port: int) -> None:
        """New clients go to others at once, those that are connected when their connections are old enough."""
        await listener.leave(port)
        moved = time.monotonic() + self._settings.handover_seconds
        while time.monotonic() < moved and self._stops < 2 and listener.count_connections(port):
            await asyncio.sleep(_POLL_SECONDS)
