"""Every call of the manager may be repeated: it dies between doing and answering, and the next one is asked again.

The short form; `scripts/kills --kills 1000` is the long one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.batches import Operation
from tests.faults.repeat import Repeat

pytestmark = pytest.mark.stack

KILLS = 64


@pytest.fixture
def repeat() -> Iterator[Repeat]:
    with (
        tempfile.TemporaryDirectory(prefix="pagehold-test-", dir="/dev/shm") as root,
        Repeat(Path(root) / "state", seed=20) as repeat,
    ):
        yield repeat


def test_killed_between_doing_and_answering_nothing_is_lost_or_doubled(repeat: Repeat) -> None:
    for _ in repeat.kills(KILLS):
        pass
    assert all(repeat.tally.kills[operation] == KILLS // len(Operation) for operation in Operation)
    repeated = set(Operation) - {Operation.ATTACH}  # whose answer is checked in every life
    assert all(repeat.tally.compared[operation] for operation in repeated), "a kind of call was never repeated"
