"""Waits until a frontend serves. `python -m services.cli.await_ready HOST:PORT [PID]`: fails when PID ends first."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SERVICE: Final = "pagehold.v1.InferenceService"


def await_ready(address: str, pid: int = 0, seconds: float = 600.0) -> bool:
    """False when the time is over, or process `pid` is gone."""
    deadline = time.monotonic() + seconds
    with grpc.insecure_channel(address, options=[("grpc.max_reconnect_backoff_ms", 100)]) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < deadline and (not pid or os.path.exists(f"/proc/{pid}")):
            try:
                reply = stub.Check(health_pb2.HealthCheckRequest(service=_SERVICE), timeout=1)
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return True
            except grpc.RpcError:
                pass  # not listening yet
            time.sleep(0.05)
    return False


if __name__ == "__main__":
    ready = await_ready(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    sys.exit(0 if ready else "pagehold: it did not become ready; see its messages above")
