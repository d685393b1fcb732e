"""Pools in device memory: made, kept, taken back, emptied; and what is refused. CUDA's memory is a stand-in's."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from kvmanager import asked
from kvmanager import pool as pools
from kvmanager.device.memory import Exporter
from kvmanager.device.refusals import Identity, refused_mps, refused_pids
from kvmanager.folders import survey
from kvmanager.fsck import check_folder
from kvmanager.geometry import difference
from kvmanager.layout import LAYER_MAJOR, Geometry, Header, KvDtype, PoolKind
from kvmanager.memory import Memory
from kvmanager.records import Records
from kvmanager.renewal import renew
from kvmanager.repair import repair
from kvmanager.service import Manager
from kvmanager.stored import check_tables
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.statedir import StateDir
from tests.device.fake_memory import DEVICE, FakeExporter
from tests.unit.kvmanager.files import (
    FINGERPRINT,
    attach_request,
    ensure_call,
    executor_log,
    key_of,
    open_call,
    take_lock,
)

ONE, TWO = b"1" * 16, b"2" * 16
KINDS = pytest.mark.parametrize("kind", [PoolKind.IPC, PoolKind.VMM])


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return StateDir.prepare(tmp_path / "state")


def manager_of(state: StateDir, exporter: Callable[[PoolKind], Exporter] = FakeExporter) -> Manager:
    return Manager(state, quota=1 << 24, ttl=600.0, hit=lambda name: None, exporter=exporter)


def device_request(
    executor_id: bytes, kind: PoolKind, mapped: bytes = b"", device: bytes = DEVICE, **geometry: object
) -> kv.AttachRequest:
    request = attach_request(executor_id, **geometry)  # type: ignore[arg-type]
    name, own = kv.PoolKind.Name(kind), Identity.own()
    request.device.CopyFrom(
        kv.Device(kind=name, uuid=device, pid=own.pid + 1, pid_namespace=own.pid_namespace, mapped_pool=mapped)
    )
    return request


def attach(manager: Manager, state: StateDir, request: kv.AttachRequest, offered: int | None = None) -> kv.Reply:
    take_lock(state, request.executor_id).release()
    return manager.attach(request, lambda pool_uuid: offered)


def with_rows(state: StateDir, kind: PoolKind) -> tuple[Manager, kv.Export]:
    """Live rows, sealed, shared and cached pages, a pinned prefix."""
    manager = manager_of(state)
    export = attach(manager, state, device_request(ONE, kind)).attach.export
    for name, pin in (("a", "system"), ("b", "")):
        assert manager.call(open_call(name, pin=pin)).HasField("open")
        assert manager.call(ensure_call(name, 60)).ensure.capacity >= 60
        executor_log(state.records, name)[0].set_progress(40, 40)
        manager.sweep()
    assert manager.core is not None and manager.core.pins.pages and len(manager.core.live_rows) == 2
    return manager, export


def memories() -> int:
    """Of the stand-in's, how many this process holds."""
    links = (os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path))
    return sum("pagehold-fake-gpu" in link for link in links)


@KINDS
def test_the_tables_say_whose_memory_it_is_and_there_is_no_file(state: StateDir, kind: PoolKind) -> None:
    reply = attach(manager_of(state), state, device_request(ONE, kind)).attach
    export, header = reply.export, np.fromfile(state.tables, np.uint64, 64)
    assert (export.kind, export.device_uuid, export.offset, export.generation) == (int(kind), DEVICE, 0, 1)
    assert export.size == 2 << 20 and reply.pages == 41 and reply.pool_is_new
    assert header[Header.POOL_UUID : Header.POOL_UUID + 2].tobytes() == export.pool_uuid
    assert header[Header.DEVICE_UUID : Header.DEVICE_UUID + 2].tobytes() == DEVICE
    assert int(header[Header.POOL_KIND]) == kind and int(header[Header.POOL_BYTES]) == 41 * 2048
    assert not state.pool.exists()
    found = survey(state)
    assert (found.pool_bytes, found.device_bytes) == (0, 0) and found.device.startswith("GPU-6120")
    lock = take_lock(state, ONE)
    assert survey(state).device_bytes == 41 * 2048
    lock.release()


@KINDS
def test_the_next_executor_gets_the_same_memory(state: StateDir, kind: PoolKind) -> None:
    manager, export = with_rows(state, kind)
    reply = attach(manager, state, device_request(TWO, kind)).attach
    assert reply.export == export and reply.epoch == 2 and not reply.pool_is_new
    assert manager.core is not None and len(manager.core.live_rows) == 2


def test_an_ipc_pool_is_empty_under_the_next_manager(state: StateDir) -> None:
    first, export = with_rows(state, PoolKind.IPC)
    assert first.pool is not None
    generations = first.pool.tables.page_word >> np.uint64(32)
    second = manager_of(state)
    assert second.pool is not None and second.core is not None
    assert second.pool.uuid != export.pool_uuid and not second.core.rows.live and not second.core.rows.pinned
    assert (second.pool.tables.page_word[1:] >> np.uint64(32) == generations[1:] + 1).all()
    assert second.pool.word(Header.POOL_BYTES) == 0 and second.core.pages.cached == 0
    # The executor that lives still maps what is lost: it gets nothing before it has let go of it.
    reply = attach(second, state, device_request(ONE, PoolKind.IPC, mapped=export.pool_uuid))
    assert reply.error.reason == kv.ERROR_REASON_STALE_EPOCH and second.pool.memory is None
    for name in ("a", "b"):
        executor_log(state.records, name)[0].set_progress(0, 40)
    reply = attach(second, state, device_request(ONE, PoolKind.IPC))
    assert reply.attach.epoch == 1 and reply.attach.pool_is_new and reply.attach.export.generation == 2
    assert second.call(ensure_call("a", 60)).ensure.capacity >= 60
    assert second.core.check_integrity() == []


def test_a_row_is_not_made_anew_before_what_was_computed_is_taken_back(state: StateDir) -> None:
    with_rows(state, PoolKind.IPC)
    second = manager_of(state)
    assert attach(second, state, device_request(ONE, PoolKind.IPC)).HasField("attach")
    assert second.call(ensure_call("a", 60)).error.reason == kv.ERROR_REASON_INVALID


def test_a_vmm_pool_comes_back_with_its_executor(state: StateDir) -> None:
    first, export = with_rows(state, PoolKind.VMM)
    assert first.pool is not None and first.pool.memory is not None and first.pool.memory.fd is not None
    offered = os.dup(first.pool.memory.fd)
    second = manager_of(state)
    assert second.core is not None and len(second.core.live_rows) == 2  # nothing is lost yet
    request = device_request(ONE, PoolKind.VMM, mapped=export.pool_uuid)
    reply = attach(second, state, request, offered).attach
    assert (reply.export.pool_uuid, reply.export.generation) == (export.pool_uuid, 1) and not reply.pool_is_new
    assert len(second.core.live_rows) == 2 and second.core.check_integrity() == []
    assert second.pool is not None and second.pool.memory is not None and second.pool.memory.fd == offered
    second.pool.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(offered)


def test_a_vmm_pool_that_nobody_has_is_made_anew(state: StateDir) -> None:
    _, export = with_rows(state, PoolKind.VMM)
    second = manager_of(state)
    reply = attach(second, state, device_request(TWO, PoolKind.VMM)).attach
    assert reply.pool_is_new and reply.export.generation == 2 and reply.export.pool_uuid != export.pool_uuid
    assert second.core is not None and not second.core.live_rows and second.core.check_integrity() == []
    assert list(reply.keys) == sorted([key_of("a"), key_of("b")])


class _Died(Exception):
    pass


class _Mortal(Memory):
    """Dies before a store."""

    def __init__(self, stores: int) -> None:
        super().__init__()
        self.left = stores

    def put(self, array: np.ndarray, index: object, value: object) -> None:
        if not self.left:
            raise _Died
        self.left -= 1
        super().put(array, index, value)


@pytest.mark.parametrize("stores", range(5))
def test_killed_while_it_empties_a_pool_the_next_one_repeats_it(state: StateDir, stores: int) -> None:
    with_rows(state, PoolKind.IPC)
    pool = pools.examine(state, writable=True)
    assert pool is not None
    with pytest.raises(_Died):
        renew(pool.tables, _Mortal(stores))
    records = Records(state.records, FINGERPRINT, 1 << 24, lambda name: None)
    assert check_tables(pool.tables, records.source) == []
    second = manager_of(state)
    assert second.core is not None and not second.core.live_rows and second.core.check_integrity() == []


def test_without_room_on_the_device_nothing_is_left(state: StateDir) -> None:
    manager = manager_of(state, lambda kind: FakeExporter(kind, capacity=1 << 20))
    reply = attach(manager, state, device_request(ONE, PoolKind.IPC))
    assert reply.error.reason == kv.ERROR_REASON_NO_MEMORY and "--kv-memory" in reply.error.message
    assert manager.pool is None and not state.tables.exists()


def test_tables_that_do_not_fit_give_the_memory_back(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = manager_of(state)
    held = memories()

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    reply = attach(manager, state, device_request(ONE, PoolKind.VMM))
    assert reply.error.reason == kv.ERROR_REASON_NO_MEMORY
    assert memories() == held and manager.pool is None


def test_a_pool_of_another_shape_takes_the_place_of_one_without_requests(state: StateDir) -> None:
    manager = manager_of(state)
    before = attach(manager, state, device_request(ONE, PoolKind.VMM)).attach.export
    held = memories()
    reply = attach(manager, state, device_request(TWO, PoolKind.VMM, rows=16)).attach
    assert reply.pool_is_new and reply.export.pool_uuid != before.pool_uuid
    assert memories() == held


# --- layouts, element types, scales ---


def geometry(kv_dtype: KvDtype, layout_id: int) -> Geometry:
    return Geometry(10, 4, 16, 3, 2, 64, kv_dtype, layout_id, 256)


def test_strides_of_both_layouts_cover_the_pool_once() -> None:
    half = 2 * 16 * 64
    assert geometry(KvDtype.FP8_E4M3, 1).strides == (3 * 2 * half, 2 * half, half)
    assert geometry(KvDtype.FLOAT16, LAYER_MAJOR).strides == (2 * 2 * half, 10 * 2 * 2 * half, 2 * half)
    assert geometry(KvDtype.INT8, 1).strides.half == half + 2 * 16 * 4  # with a scale to each slot
    for shape in (geometry(KvDtype.FLOAT32, 1), geometry(KvDtype.INT8, 1), geometry(KvDtype.BFLOAT16, LAYER_MAJOR)):
        page, layer, half = shape.strides
        starts = sorted(p * page + n * layer + h * half for p in range(10) for n in range(3) for h in range(2))
        assert starts == list(range(0, shape.pages * shape.page_bytes, half))


def fp8_request(scales: list[float], executor_id: bytes = ONE) -> kv.AttachRequest:
    request = device_request(executor_id, PoolKind.IPC, kv_dtype="fp8_e4m3", kv_heads=2, layout_id=LAYER_MAJOR)
    request.scales.extend(scales)
    return request


def test_scales_are_fixed_for_the_life_of_the_pool(state: StateDir) -> None:
    manager, scales = manager_of(state), [0.5, 0.25, 0.1, 2.0]
    assert attach(manager, state, fp8_request(scales)).attach.pool_is_new
    assert manager.call(open_call("a")).HasField("open")
    found = pools.adopt(state)
    assert found is not None and found.tables.scales.tolist() == np.float32(scales).tolist()
    assert not attach(manager, state, fp8_request(scales)).attach.pool_is_new
    reply = attach(manager, state, fp8_request([0.5, 0.25, 0.1, 1.0]))
    assert reply.error.reason == kv.ERROR_REASON_WRONG_MODEL and "fp8 scales" in reply.error.message


def test_int8_pages_are_refused_on_a_device(state: StateDir) -> None:
    reply = attach(manager_of(state), state, device_request(ONE, PoolKind.IPC, kv_dtype="int8", layout_id=LAYER_MAJOR))
    assert reply.error.reason == kv.ERROR_REASON_INVALID and "int8 are for CPUs only" in reply.error.message


@pytest.mark.parametrize("scales", [[], [1.0] * 3, [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, float("nan")]])
def test_scales_that_are_none_are_refused(state: StateDir, scales: list[float]) -> None:
    reply = attach(manager_of(state), state, fp8_request(scales))
    assert reply.error.reason == kv.ERROR_REASON_INVALID and "positive scales" in reply.error.message


# --- refused early ---


def test_another_device_or_kind_is_refused_while_there_are_requests(state: StateDir) -> None:
    manager, _ = with_rows(state, PoolKind.IPC)
    for request, named in (
        (device_request(ONE, PoolKind.IPC, device=b"another device.."), "another device"),
        (device_request(ONE, PoolKind.VMM), "--pool"),
        (attach_request(ONE), "--device"),
    ):
        reply = attach(manager, state, request)
        assert reply.error.reason == kv.ERROR_REASON_WRONG_MODEL and named in reply.error.message
    there = pools.examine(state)
    assert there is not None
    assert difference(there.geometry, "ab", there.geometry, "ab", there.place, there.place) == ""


def test_a_device_that_the_manager_does_not_see_is_named(state: StateDir) -> None:
    reply = attach(manager_of(state), state, device_request(ONE, PoolKind.VMM, device=b"another device.."))
    assert reply.error.reason == kv.ERROR_REASON_INVALID and "GPU-616e6f74-" in reply.error.message


@pytest.mark.parametrize("device", [b"", b"short", bytes(16)])
def test_a_device_without_a_uuid_is_refused(state: StateDir, device: bytes) -> None:
    reply = attach(manager_of(state), state, device_request(ONE, PoolKind.IPC, device=device))
    assert reply.error.reason == kv.ERROR_REASON_INVALID and "uuid" in reply.error.message


def test_the_same_pid_in_two_namespaces_is_refused_for_ipc_alone(state: StateDir) -> None:
    request = device_request(ONE, PoolKind.IPC)
    request.device.pid = os.getpid()
    request.device.pid_namespace += 1
    reply = attach(manager_of(state), state, request)
    assert reply.error.reason == kv.ERROR_REASON_INVALID and "--pool vmm" in reply.error.message
    request.device.kind = kv.POOL_KIND_VMM
    assert attach(manager_of(state), state, request).HasField("attach")
    same = partial(refused_pids, PoolKind.IPC, Identity(1, 7))
    assert same(Identity(1, 7)) == same(Identity(2, 8)) == "" != same(Identity(1, 8))


def test_mps_is_refused_while_its_daemon_answers(
    state: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipes = tmp_path / "mps"
    assert refused_mps({}, default=pipes) == ""
    pipes.mkdir()
    os.mkfifo(pipes / "control")
    assert refused_mps({}, default=pipes) == ""  # it is dead
    daemon = os.open(pipes / "control", os.O_RDONLY | os.O_NONBLOCK)
    assert "nvidia-cuda-mps-control" in refused_mps({}, default=pipes)
    assert refused_mps({"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}, default=pipes) == ""
    monkeypatch.setattr(asked.os, "environ", {"CUDA_MPS_PIPE_DIRECTORY": str(pipes)})
    reply = attach(manager_of(state), state, device_request(ONE, PoolKind.VMM))
    assert reply.error.reason == kv.ERROR_REASON_INVALID and str(pipes) in reply.error.message
    os.close(daemon)


# --- folders ---


def test_a_dead_folder_is_sound_without_a_pool_file(state: StateDir) -> None:
    with_rows(state, PoolKind.VMM)
    assert check_folder(state).findings == []
    state.pool.write_bytes(b"x")
    (finding,) = check_folder(state).findings
    assert "memory of this pool is a device's" in str(finding)
    assert repair(state)[1].findings == [] and not state.pool.exists()
    state.pool.write_bytes(b"x")
    pools.discard(state)
    assert not state.tables.exists() and not state.pool.exists()
