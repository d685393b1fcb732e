"""Pools of both kinds between real processes, one of which dies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmanager.layout import PoolKind

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

from gpu.parts.processes import Scene, illegal_access, last_write, owner_killed, parked_descriptor, scene

NBYTES = 64 << 20


@pytest.fixture(params=[PoolKind.IPC, PoolKind.VMM], ids=["ipc", "vmm"])
def one(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with scene(request.param, "", NBYTES) as found:
        yield found


def test_pages_outlive_their_owner_while_somebody_uses_them(one: Scene) -> None:
    assert owner_killed(one)["answer"].startswith("intact")


def test_a_killed_writer_has_written_its_last_word(one: Scene) -> None:
    """When its pidfd is readable: the next epoch begins only then."""
    assert last_write(one)["answer"] == "none later"


def test_a_descriptor_keeps_a_pool_that_nobody_maps(one: Scene) -> None:
    answer = parked_descriptor(one)["answer"]
    assert answer == "intact" if one.kind is PoolKind.VMM else answer.startswith("gone")


def test_an_illegal_access_harms_no_other_process(one: Scene) -> None:
    found = illegal_access(one)["answer"]
    assert found.startswith("the pool is unharmed") and "no error" not in found
