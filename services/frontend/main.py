"""The frontend process: the public port, and one stream to the executor."""

from __future__ import annotations

import asyncio
import math
import signal
import sys
import time
from typing import Final

import grpc
import structlog
import uvloop
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from pagehold.runtime import failpoint, logs
from pagehold.runtime.progress import Progress, State
from pagehold.runtime.settings import FrontendSettings
from pagehold.runtime.statedir import StateDir, StateDirError
from pagehold.v1 import inference_pb2, inference_pb2_grpc
from services.frontend.errors import ErrorGuard, unavailable
from services.frontend.inference import InferenceServicer
from services.frontend.link import ExecutorLink
from services.frontend.modelinfo import ModelServicer

log = structlog.get_logger()

EXIT_CONFIG: Final = 78  # EX_CONFIG: starting again will not help
_SERVICES: Final = tuple(service.full_name for service in inference_pb2.DESCRIPTOR.services_by_name.values())
_LOST_SECONDS: Final = 2.0  # an executor that is replaced within this time is no reason to be unready
_POLL_SECONDS: Final = 0.1


def main(settings: FrontendSettings) -> int:
    """Runs until SIGTERM. Returns the exit code."""
    logs.configure("frontend", settings.log_level)
    failpoint.arm(settings.failpoints)
    try:
        state = StateDir.prepare(settings.state_dir)
        progress = Progress(state.progress("frontend"))
        address = settings.executor or f"unix:{state.executor_socket}"
        return uvloop.run(_Frontend(settings, progress, address).run())
    except StateDirError as error:
        print(f"pagehold frontend: {error}", file=sys.stderr)
        return EXIT_CONFIG


class _Frontend:
    def __init__(self, settings: FrontendSettings, progress: Progress, executor_address: str) -> None:
        self._settings = settings
        self._progress = progress
        self._link = ExecutorLink(executor_address, self._changed)
        self._inference = InferenceServicer(self._link, settings.max_streams, settings.max_stream_buffer)
        self._health = health_aio.HealthServicer()
        self._lost_at = -math.inf  # when the executor was last lost
        self._stops = 0
        self._stop = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopped)
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
        await self._set_ready(False)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        log.info("listening", address=self._settings.listen)
        linking = asyncio.create_task(self._link.run())
        watching = asyncio.create_task(self._watch())
        await self._stop.wait()
        watching.cancel()
        await self._drain(server)
        linking.cancel()
        self._progress.set_state(State.DOWN)
        return 0

    def _server(self) -> grpc.aio.Server:
        size = self._settings.max_message_bytes
        server = grpc.aio.server(
            interceptors=[ErrorGuard()],
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", size),
                # A long prefill sends nothing: clients that ping every 30 s must not be cut off for it.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self._inference, server)
        inference_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(self._link), server)
        add_HealthServicer_to_server(self._health, server)
        if self._settings.reflection:
            names = (*_SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return server

    def _stopped(self) -> None:
        self._stops += 1
        self._stop.set()

    def _changed(self) -> None:
        if not self._link.connected:
            self._lost_at = time.monotonic()

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

    async def _drain(self, server: grpc.aio.Server) -> None:
        """Not ready first; open streams get their time; what is left ends UNAVAILABLE and goes on detached."""
        self._progress.set_state(State.DRAINING)
        self._inference.draining = True
        await self._health.enter_graceful_shutdown()
        deadline = time.monotonic() + self._settings.drain_grace
        while self._link.streams and time.monotonic() < deadline and self._stops < 2:
            await asyncio.sleep(0.02)
        for stream in self._link.streams:
            stream.fail(unavailable("this frontend is shutting down; Resume at another"))
        while self._link.streams and time.monotonic() < deadline + 1:
            await asyncio.sleep(0.02)
        await server.stop(0.5)
