"""`--metrics-listen`: a supervisor as whoever watches it sees it, over HTTP.

GET /metrics   what the supervisor knows of its children, and what these answer over their sockets
GET /ready     200 while every component kept here is ready, else 503
GET /live      200: the supervisor itself runs

It answers while a child is dead, hangs or starts: what that child would say is left out then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import grpc
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.core import Metric

import pagehold
from pagehold.admin.v1 import admin_pb2 as admin
from pagehold.admin.v1 import admin_pb2_grpc as admin_grpc
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.executor.v1 import executor_pb2_grpc as ex_grpc
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from pagehold.runtime.channel import client_options
from services.supervisor import metrics
from services.supervisor.fleet import Fleet

_ANSWER_SECONDS: Final = 1.0  # of a child; who is slower is left out
_ASK_SECONDS: Final = 5.0  # of whoever connects
_MOST_BYTES: Final = 8192
_TEXT: Final = "text/plain; charset=utf-8"

Answer = tuple[HTTPStatus, str, bytes]


async def listen(address: str, fleet: Fleet) -> asyncio.Server:
    """address: HOST:PORT. Raises OSError, or ValueError for what is no such address."""
    host, _, port = address.rpartition(":")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                method, path, *_ = head.split(b" ", 2)
                status, kind, body = await _answer(method, path, fleet)
                writer.write(
                    f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                )
                writer.write(body)
                await writer.drain()
        except (OSError, ValueError, EOFError, asyncio.LimitOverrunError):
            pass  # gone, or no HTTP
        finally:
            writer.close()

    return await asyncio.start_server(serve, host.strip("[]") or None, int(port), limit=_MOST_BYTES)


async def _answer(method: bytes, path: bytes, fleet: Fleet) -> Answer:
    if method != b"GET":
        return HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"only GET\n"
    match path:
        case b"/metrics":
            return HTTPStatus.OK, CONTENT_TYPE_PLAIN_0_0_4, metrics.render(await collect(fleet))
        case b"/ready":
            if waiting := fleet.not_ready():
                return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"waiting for {', '.join(waiting)}\n".encode()
            return HTTPStatus.OK, _TEXT, b"ready\n"
        case b"/live":
            return HTTPStatus.OK, _TEXT, b"live\n"
        case _:
            return HTTPStatus.NOT_FOUND, _TEXT, b"/metrics, /ready or /live\n"


async def collect(fleet: Fleet) -> list[Metric]:
    """Everything that is exported now."""
    standings = [metrics.Standing(child.component, child.name, child.is_ready) for child in fleet.children]
    parts = [_PARTS[component](fleet) for component in _PARTS if fleet.of(component)]
    answers = await asyncio.gather(*parts)
    return metrics.of_supervisor(pagehold.__version__, standings, fleet.deaths()) + [
        family for families in answers for family in families
    ]


async def _manager(fleet: Fleet) -> list[Metric]:
    path = fleet.state.kvmanager_socket
    stats = await _ask(path, kv_grpc.KvManagerServiceStub, lambda stub: stub.GetStats, kv.GetStatsRequest())
    return metrics.of_manager(stats) if stats is not None else []


async def _executor(fleet: Fleet) -> list[Metric]:
    path = fleet.state.executor_socket
    load = await _ask(path, ex_grpc.ExecutorServiceStub, lambda stub: stub.GetLoad, ex.GetLoadRequest())
    return metrics.of_executor(load) if load is not None else []


async def _frontends(fleet: Fleet) -> list[Metric]:
    names = [child.name for child in fleet.of("frontend")]

    async def ask(name: str) -> Any:
        path = fleet.state.socket_of(name)
        return await _ask(path, admin_grpc.AdminServiceStub, lambda stub: stub.GetTally, admin.GetTallyRequest())

    tallies = zip(names, await asyncio.gather(*map(ask, names)), strict=True)
    return metrics.of_frontends({name: tally for name, tally in tallies if tally is not None})


_PARTS: Final = {"frontend": _frontends, "executor": _executor, "kvmanager": _manager}


async def _ask(path: Path, make: Callable[[Any], Any], method: Callable[[Any], Any], request: Any) -> Any:
    """The answer of whoever listens there; None without one."""
    async with grpc.aio.insecure_channel(f"unix:{path}", options=client_options()) as channel:
        try:
            return await method(make(channel))(request, timeout=_ANSWER_SECONDS)
        except grpc.aio.AioRpcError:
            return None
