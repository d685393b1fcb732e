"""Real shared files in a folder of the test's, and what an executor would send."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvmanager.keys import request_key
from kvmanager.layout import OutputLog, RequestLog
from kvmanager.service import Manager
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.lock import FileLock
from pagehold.runtime.statedir import StateDir
from pagehold.v1 import inference_pb2 as api

PAGE_SIZE = 16
PAGE_BYTES = 2 * 32 * PAGE_SIZE * 2  # one layer, one head of 32, bfloat16
FINGERPRINT = "ab" * 32


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def manager_of(state: StateDir, clock: Clock | None = None, quota: int = 1 << 24, ttl: float = 600.0) -> Manager:
    return Manager(state, quota=quota, ttl=ttl, hit=lambda name: None, clock=clock or Clock())


def take_lock(state: StateDir, executor_id: bytes) -> FileLock:
    """What an executor does before it attaches. The lock is free again when the object is released."""
    lock = FileLock(state.executor_lock)
    lock.acquire()
    lock.write_id(executor_id)
    return lock


def attach_request(executor_id: bytes, pages: int = 40, **geometry: object) -> kv.AttachRequest:
    sizes: dict[str, object] = {
        "layers": 1,
        "kv_heads": 1,
        "head_dim": 32,
        "page_size": PAGE_SIZE,
        "kv_dtype": "bfloat16",
        "layout_id": 1,
        "max_model_len": 512,
        "rows": 8,
    }
    return kv.AttachRequest(
        executor_id=executor_id,
        fingerprint=FINGERPRINT,
        geometry=kv.Geometry(**{**sizes, **geometry}),  # type: ignore[arg-type]
        pool_bytes=(pages + 1) * PAGE_BYTES,
        prefix_cache=True,
    )


def attached(state: StateDir, executor_id: bytes = b"1" * 16, clock: Clock | None = None, **limits: int) -> Manager:
    """A manager with a pool and an executor that is alive no more."""
    manager = manager_of(state, clock, **limits)
    take_lock(state, executor_id).release()
    assert manager.attach(attach_request(executor_id)).HasField("attach")
    return manager


def record(name: str, prompt: int = 40, pin: str = "", **fields: object) -> kv.RequestRecord:
    wanted: dict[str, object] = {
        "tenant": "default",
        "request_id": name,
        "request": api.GenerateRequest(request_id=name, pin_prefix=pin).SerializeToString(),
        "prompt": range(100, 100 + prompt),
        "digest": b"d",
        "outputs": 1,
        "max_tokens": 20,
    }
    return kv.RequestRecord(**(wanted | fields))  # type: ignore[arg-type]


def key_of(name: str) -> str:
    return request_key("default", name)


def open_call(name: str, **fields: object) -> kv.Call:
    return kv.Call(open=kv.OpenRequest(record=record(name, **fields)))  # type: ignore[arg-type]


def ensure_call(name: str, capacity: int, index: int = 0) -> kv.Call:
    return kv.Call(ensure=kv.EnsureRequest(key=key_of(name), index=index, capacity=capacity))


def close_call(name: str, generation: int) -> kv.Call:
    return kv.Call(close=kv.CloseRequest(key=key_of(name), row_generation=generation))


def log_keys(records: Path) -> list[str]:
    """Of all records."""
    return [path.stem for path in records.glob("*.log")]


def executor_log(records: Path, name: str) -> list[OutputLog]:
    """The log as its executor maps it: writable."""
    return key_log(records, key_of(name))


def key_log(records: Path, key: str) -> list[OutputLog]:
    data = np.memmap(records / f"{key}.log", np.uint8, "r+")
    return RequestLog(memoryview(data)).outputs
