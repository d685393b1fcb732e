"""Neither a pin nor a request is accepted that the other makes impossible. Pools of 40 pages of 16 tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmanager.layout import Reason
from kvmanager.pins import Pin
from kvmanager.service import Manager
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.statedir import StateDir
from tests.unit.kvmanager.files import attached, close_call, ensure_call, executor_log, manager_of, open_call


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return StateDir.prepare(tmp_path / "state")


def opened(manager: Manager, name: str, **fields: object) -> kv.ErrorReason | None:
    """None: it was opened."""
    reply = manager.call(open_call(name, **fields))
    return reply.error.reason if reply.HasField("error") else None


def lived(manager: Manager, state: StateDir, name: str, prompt: int, pin: str) -> None:
    """A request that pins its prompt was computed and closed; it has not ended."""
    assert opened(manager, name, prompt=prompt, pin=pin) is None
    row = manager.call(ensure_call(name, prompt)).ensure
    (output,) = executor_log(state.records, name)
    output.set_progress(prompt, prompt)
    manager.call(close_call(name, row.row_generation))
    output.set_progress(0, prompt)


def test_a_pin_holds_at_most_half_of_the_pool_with_those_to_come(state: StateDir) -> None:
    manager = attached(state)
    assert opened(manager, "a", prompt=321, max_tokens=1, pin="one") is None  # 20 pages
    assert opened(manager, "b", prompt=16, max_tokens=1, pin="two") == kv.ERROR_REASON_QUOTA
    assert opened(manager, "c", prompt=16, max_tokens=1, pin="one") is None  # takes the other's place
    assert opened(manager, "d", prompt=320, max_tokens=1) is None
    assert opened(manager, "e", prompt=337, max_tokens=1) == kv.ERROR_REASON_TOO_LARGE


def test_under_one_name_the_largest_prompt_counts(state: StateDir) -> None:
    manager = attached(state)
    assert opened(manager, "a", prompt=160, max_tokens=1, pin="one") is None
    assert opened(manager, "b", prompt=336, max_tokens=1, pin="one") == kv.ERROR_REASON_QUOTA  # 21 pages of 40
    assert opened(manager, "c", prompt=320, max_tokens=1, pin="one") is None
    assert opened(manager, "d", prompt=16, max_tokens=1, pin="two") == kv.ERROR_REASON_QUOTA


def test_what_is_pinned_counts_after_its_request_is_gone(state: StateDir) -> None:
    manager = attached(state)
    lived(manager, state, "a", 160, "one")
    assert manager.unpin(Pin("default", "two")) is False
    assert [(found.pin, found.pages) for found in manager.pins()] == [(Pin("default", "one"), 10)]
    assert manager.stats(True).pinned_pages == 10
    manager = manager_of(state)
    assert opened(manager, "b", prompt=176, max_tokens=1, pin="two") == kv.ERROR_REASON_QUOTA
    assert manager.unpin(Pin("default", "one")) is True
    executor_log(state.records, "a")[0].set_terminal(Reason.LENGTH, 0)  # until then it may be pinned again
    assert opened(manager, "b", prompt=176, max_tokens=1, pin="two") is None


def test_a_request_that_does_not_fit_beside_pins_is_too_large(state: StateDir) -> None:
    manager = attached(state)
    lived(manager, state, "a", 160, "one")
    # 31 pages; its prompt is the start of the pinned one, and shares its pages or not.
    assert opened(manager, "short", prompt=15, max_tokens=482) == kv.ERROR_REASON_TOO_LARGE
    assert opened(manager, "long", prompt=40, max_tokens=457) is None


def test_a_pin_leaves_room_for_what_is_open(state: StateDir) -> None:
    manager = attached(state)
    assert opened(manager, "large", prompt=17, max_tokens=480) is None  # 31 pages of 40
    assert opened(manager, "a", prompt=160, max_tokens=1, pin="one") == kv.ERROR_REASON_QUOTA
    assert opened(manager, "b", prompt=144, max_tokens=1, pin="one") is None
    assert opened(manager, "c", prompt=17, max_tokens=496) == kv.ERROR_REASON_TOO_LARGE


def test_at_most_64_names(state: StateDir) -> None:
    manager = attached(state, quota=1 << 26)
    for number in range(64):
        assert opened(manager, str(number), prompt=1, max_tokens=1, pin=f"pin {number}") is None
    assert opened(manager, "one more", prompt=1, max_tokens=1, pin="another") == kv.ERROR_REASON_QUOTA
