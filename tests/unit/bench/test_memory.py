from __future__ import annotations

import os
from typing import Any

import pytest
from peers_lib import memory


def test_a_short_part_has_the_memory_that_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([300, 40])  # at the beginning; at the end, when another process has taken its place
    monkeypatch.setattr(memory, "INTERVAL", 3600.0)
    monkeypatch.setattr(memory, "proportional_size", lambda pid: next(sizes))
    monkeypatch.setattr(memory, "descendants", lambda root: [root])
    watch: Any
    with memory.PeakMemory(os.getpid()) as watch:
        pass
    assert watch.peak == 300


def test_this_process_has_a_size() -> None:
    assert memory.proportional_size(os.getpid()) > 1 << 20
    assert memory.descendants(os.getpid())[0] == os.getpid()
