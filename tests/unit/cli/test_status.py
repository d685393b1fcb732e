"""`pagehold status`: pages by what they are used for, read from the tables alone."""

from __future__ import annotations

import json

from kvmanager.service import Manager
from pagehold.runtime.progress import Progress, State
from pagehold.runtime.statedir import StateDir
from tests.unit.cli.command import Command
from tests.unit.kvmanager.files import close_call, key_of


def pool_of(pagehold: Command, state: StateDir) -> dict[str, int]:
    assert pagehold("status", "--json", "--state-dir", state.root) == 0
    found: dict[str, int] = json.loads(pagehold.out)["pool"]
    return found


def test_pinned_pages_are_used_pages(pagehold: Command, state: StateDir, manager: Manager) -> None:
    # The row shares the two pinned pages and has two of its own.
    assert pool_of(pagehold, state) == {"pages": 40, "free": 36, "shared": 2, "pinned": 2, "page_size": 16}
    assert manager.core is not None
    row = manager.core.live_rows[key_of("a"), 0]
    assert manager.call(close_call("a", row.generation)).HasField("close")
    assert pool_of(pagehold, state) == {"pages": 40, "free": 38, "shared": 0, "pinned": 2, "page_size": 16}
    assert manager.stats(False).free_pages == 38
    assert pagehold("status", "--state-dir", state.root) == 0
    assert "40 of 16 tokens, 38 free, 0 shared, 2 pinned" in pagehold.out


def test_findings_between_calls_are_shown(pagehold: Command, state: StateDir, manager: Manager) -> None:
    progress = Progress(state.progress("kvmanager"))
    progress.set_state(State.READY)
    assert pagehold("status", "--state-dir", state.root) == 0
    assert "integrity" not in pagehold.out
    progress.set_findings(3)
    assert pagehold("status", "--state-dir", state.root) == 0
    assert "integrity: 3 findings; run pagehold fsck" in pagehold.out
    assert pagehold("status", "--json", "--state-dir", state.root) == 0
    assert json.loads(pagehold.out)["components"]["kvmanager"]["integrity_findings"] == 3
