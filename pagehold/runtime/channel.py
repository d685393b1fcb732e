"""gRPC options of the internal channels: one place, so that both ends agree."""

from __future__ import annotations

from typing import Final

Options = list[tuple[str, int]]

# tokenizer.json travels in Describe and can be tens of megabytes; prompts stay far below.
INTERNAL_MESSAGE_BYTES: Final = 64 << 20


def client_options() -> Options:
    """Fast reconnects: a peer that restarts is back in well under a second."""
    return [
        ("grpc.initial_reconnect_backoff_ms", 50),
        # Despite its name this is how long one attempt may take: a busy peer needs a while to answer.
        ("grpc.min_reconnect_backoff_ms", 2000),
        ("grpc.max_reconnect_backoff_ms", 200),
        ("grpc.max_receive_message_length", INTERNAL_MESSAGE_BYTES),
        ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
        ("grpc.enable_http_proxy", 0),
    ]


def server_options() -> Options:
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", INTERNAL_MESSAGE_BYTES),
        ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
    ]
