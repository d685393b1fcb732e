"""gRPC options of the internal channels: one place, so that both ends agree."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from typing import Final

import structlog

log = structlog.get_logger()

Options = list[tuple[str, int]]

# tokenizer.json travels in Describe and can be tens of megabytes; prompts stay far below.
INTERNAL_MESSAGE_BYTES: Final = 64 << 20
_LOOK_SECONDS: Final = 0.01
_SILENT_SECONDS: Final = 3.0  # until it is said that nobody listens
_SILENT_LOOK_SECONDS: Final = 0.1  # after that, for as long as it takes: it must cost little
_LEAST_PING_MS: Final = 100


async def listening(address: str) -> None:
    """Returns once somebody listens there; at once for what is no Unix socket.

    gRPC's own attempts are at least 0.1 s apart, longer than a standby takes: a channel that is made now finds its
    peer at the first one.
    """
    path = address.removeprefix("unix:")
    tell_at = time.monotonic() + _SILENT_SECONDS
    seconds = _LOOK_SECONDS
    while path != address and not _accepts(path):
        if time.monotonic() > tell_at:
            tell_at, seconds = math.inf, _SILENT_LOOK_SECONDS
            log.warning("nobody listens there; waiting. Does it run, and have the same state folder?", socket=path)
        await asyncio.sleep(seconds)


def _accepts(path: str) -> bool:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            probe.connect(path)
    except BlockingIOError:
        return True  # so many ask that it cannot keep up
    except OSError:
        return False
    return True


def client_options(hang_seconds: float = 10.0) -> Options:
    """Fast reconnects: a peer that restarts is back in well under a second.

    hang_seconds: a peer that does not answer for about that long counts as away.
    """
    return [
        ("grpc.use_local_subchannel_pool", 1),  # a new channel does not inherit an old one's backoff
        ("grpc.keepalive_time_ms", max(int(hang_seconds * 500), _LEAST_PING_MS)),
        ("grpc.keepalive_timeout_ms", max(int(hang_seconds * 500), _LEAST_PING_MS)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 50),
        # Despite its name this is how long one attempt may take: a busy peer needs a while to answer.
        ("grpc.min_reconnect_backoff_ms", 2000),
        ("grpc.max_reconnect_backoff_ms", 200),
        ("grpc.max_receive_message_length", INTERNAL_MESSAGE_BYTES),
        ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
        ("grpc.enable_http_proxy", 0),
    ]


def server_options(hang_seconds: float | None = None) -> Options:
    """hang_seconds: where peers come from other machines, those that say nothing for about that long are gone."""
    asking: Options = []
    if hang_seconds is not None:
        milliseconds = max(int(hang_seconds * 500), _LEAST_PING_MS)
        asking = [
            ("grpc.keepalive_time_ms", milliseconds),
            ("grpc.keepalive_timeout_ms", milliseconds),
            # Of the ping itself; a minute unless told. The other timeout alone has ended no connection.
            ("grpc.http2.ping_timeout_ms", milliseconds),
            ("grpc.http2.max_pings_without_data", 0),
        ]
    return [
        *asking,
        ("grpc.so_reuseport", 0),
        # Peers ask whether this process still runs, see above; no sign of an attack.
        ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_PING_MS // 2),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_receive_message_length", INTERNAL_MESSAGE_BYTES),
        ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
    ]
