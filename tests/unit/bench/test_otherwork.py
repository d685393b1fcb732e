"""Of the measuring process itself; what others do meanwhile cannot be known here."""

from __future__ import annotations

import time

from peers_lib.otherwork import OtherWork, _own_seconds


def test_own_time_is_not_others() -> None:
    before = _own_seconds()
    end = time.process_time() + 0.5
    watch = OtherWork()
    while time.process_time() < end:
        pass
    assert _own_seconds() - before >= 0.4
    assert watch.processors() >= 0.0
