"""The executor's end of a pool in device memory, against a manager in the same process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvmanager.device.leash import Leash
from kvmanager.device.memory import DeviceError
from kvmanager.layout import PoolKind
from kvmanager.service import Manager
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.statedir import StateDir
from services.executor import devicepool
from services.executor.backend import PoolGone
from services.executor.devicepool import DevicePool
from services.executor.shared import SharedPool
from tests.device.fake_memory import DEVICE, FakeExporter, FakeImporter, view_of
from tests.unit.kvmanager.files import attach_request, take_lock

ONE = b"1" * 16
KINDS = pytest.mark.parametrize("kind", [PoolKind.IPC, PoolKind.VMM])


class World:
    """An executor, and one manager after another."""

    def __init__(self, state: StateDir, kind: PoolKind) -> None:
        self.state, self.kind = state, kind
        take_lock(state, ONE).release()
        self.shared = SharedPool(state)
        self.losses = 0
        self.pool = DevicePool(state, self.shared, FakeImporter(), kind, DEVICE, self._lost)
        self.start_manager()

    async def _lost(self) -> None:
        self.losses += 1

    def start_manager(self) -> None:
        self.manager = Manager(self.state, 1 << 24, 600.0, lambda name: None, exporter=FakeExporter)
        self.leash = Leash(self.state.leash_socket)
        self.leash.start()

    def kill_manager(self) -> None:
        """All but the files is gone."""
        self.leash.close()
        assert self.manager.pool is not None
        self.manager.pool.close()

    async def attach(self) -> kv.AttachResponse:
        request = await self.pool.prepared(attach_request(ONE))
        assert await self.leash.greeting(ONE, 5)
        reply = self.manager.attach(request, lambda uuid: self.leash.take_offer(ONE, uuid))
        assert reply.HasField("attach"), reply
        self.manager.hand_over(ONE, self.leash.hand_over)
        if not self.shared.mapped:
            self.shared.map_tables()
        return reply.attach


@pytest.fixture
async def world(tmp_path: Path, kind: PoolKind) -> AsyncIterator[World]:
    world = World(StateDir.prepare(tmp_path / "s"), kind)
    yield world
    world.pool.close()
    world.leash.close()


@KINDS
async def test_it_opens_what_the_manager_exports_once(world: World) -> None:
    mapping = world.pool.opened((await world.attach()).export)
    assert mapping is not None and mapping.nbytes == 2 << 20
    geometry = world.shared.geometry
    assert geometry.pages * geometry.page_bytes <= mapping.nbytes and not world.shared.scales.size
    view_of(mapping)[7] = 9
    assert world.pool.opened((await world.attach()).export) is None  # the stream broke, and nothing else
    assert view_of(mapping)[7] == 9 and world.losses == 0


@KINDS
async def test_after_a_restart_of_the_manager(world: World, kind: PoolKind) -> None:
    first = world.pool.opened((await world.attach()).export)
    assert first is not None
    view_of(first)[7] = 9
    world.kill_manager()
    world.start_manager()
    response = await world.attach()
    again = world.pool.opened(response.export)
    if kind is PoolKind.VMM:
        assert again is None and view_of(first)[7] == 9 and world.losses == 0
    else:
        assert again is not None and view_of(again)[7] == 0 and world.losses == 1
        assert response.export.generation == 2 and world.shared.pool_uuid == response.export.pool_uuid
    assert world.shared.still_the_same()


@pytest.mark.parametrize("kind", [PoolKind.IPC])
async def test_what_was_interrupted_while_it_let_go_is_repeated(world: World) -> None:
    world.pool.opened((await world.attach()).export)
    world.kill_manager()
    world.start_manager()
    real, started = world.pool._lost, asyncio.Event()

    async def never() -> None:
        started.set()
        await asyncio.Event().wait()

    world.pool._lost = never
    attaching = asyncio.create_task(world.pool.prepared(attach_request(ONE)))
    await started.wait()
    attaching.cancel()
    world.pool._lost = real
    assert world.pool.opened((await world.attach()).export) is not None and world.losses == 1


@KINDS
async def test_it_waits_for_a_manager(world: World) -> None:
    world.leash.close()
    world.state.leash_socket.unlink()
    preparing = asyncio.create_task(world.pool.prepared(attach_request(ONE)))
    await asyncio.sleep(0.05)
    assert not preparing.done()
    world.leash = Leash(world.state.leash_socket)
    world.leash.start()
    request = await asyncio.wait_for(preparing, 5)
    assert (request.device.kind, request.device.uuid, request.device.pid) == (world.kind, DEVICE, os.getpid())
    assert request.device.mapped_pool == b"" and request.executor_id == ONE


@KINDS
async def test_an_export_that_is_not_what_was_asked_for_is_refused(world: World, kind: PoolKind) -> None:
    for wrong, said in (
        ({"device_uuid": b"x" * 16}, "GPU-78787878-.*same --pool and the same GPUs"),
        ({"kind": "POOL_KIND_IPC" if kind is PoolKind.VMM else "POOL_KIND_VMM"}, "same --pool"),
        ({"size": 1 << 12}, "smaller than its pool"),
        ({"offset": 2 << 20}, "smaller than its pool"),
    ):
        export = (await world.attach()).export
        export.MergeFrom(kv.Export(**wrong))  # type: ignore[arg-type]
        with pytest.raises(DeviceError, match=said):
            world.pool.opened(export)
    assert world.pool.opened((await world.attach()).export) is not None
    if kind is PoolKind.IPC:
        other = (await world.attach()).export
        other.pool_uuid = b"another pool...."
        with pytest.raises(PoolGone, match="another pool than the one that is mapped"):
            world.pool.opened(other)


@pytest.mark.parametrize("kind", [PoolKind.VMM])
async def test_a_descriptor_that_does_not_come_is_not_waited_for_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devicepool, "_HAND_OVER_SECONDS", 0.05)
    export = (await world.attach()).export
    assert world.pool.opened(export) is not None
    with pytest.raises(PoolGone, match=r"did not come over leash\.sock; starting again: timed out"):
        world.pool.opened(export)


@KINDS
async def test_mps_is_refused_before_anything_is_opened(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "control")
    daemon = os.open(tmp_path / "control", os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    with pytest.raises(DeviceError, match="MPS"):
        DevicePool(world.state, world.shared, FakeImporter(), world.kind, DEVICE, world._lost)
    os.close(daemon)
