"""The manager's calls over real files: who may attach, what is refused, what is forgotten when."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmanager import pool as pools
from kvmanager.layout import Reason
from kvmanager.service import Manager
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.protocol import PROTOCOL
from pagehold.runtime.statedir import StateDir
from tests.unit.kvmanager.files import (
    PAGE_SIZE,
    Clock,
    attach_request,
    attached,
    close_call,
    ensure_call,
    executor_log,
    key_of,
    manager_of,
    open_call,
    record,
    take_lock,
)


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return StateDir.prepare(tmp_path / "state")


def reason(reply: kv.Reply) -> int:
    assert reply.HasField("error"), reply
    assert reply.error.message
    return reply.error.reason


def end(state: StateDir, name: str) -> None:
    for output in executor_log(state.records, name):
        output.set_terminal(Reason.LENGTH, output.known - output.prompt_length)


def forget_call(name: str) -> kv.Call:
    return kv.Call(forget=kv.ForgetRequest(key=key_of(name)))


# --- attach ---


def test_only_the_id_in_the_lock_file_attaches(state: StateDir) -> None:
    manager = manager_of(state)
    assert reason(manager.attach(attach_request(b"1" * 16))) == kv.ERROR_REASON_STALE_EPOCH
    take_lock(state, b"1" * 16).release()
    assert reason(manager.attach(attach_request(b"2" * 16))) == kv.ERROR_REASON_STALE_EPOCH
    assert reason(manager.attach(attach_request(b""))) == kv.ERROR_REASON_STALE_EPOCH
    assert manager.attach(attach_request(b"1" * 16)).attach.pool_is_new


def test_an_epoch_for_each_executor_and_not_for_each_manager(state: StateDir) -> None:
    manager = attached(state, b"1" * 16)
    assert manager.attach(attach_request(b"1" * 16)).attach.epoch == 1
    again = manager_of(state)
    reply = again.attach(attach_request(b"1" * 16)).attach
    assert (reply.epoch, reply.pool_is_new, reply.incarnation) == (1, False, again.incarnation)
    assert again.incarnation != manager.incarnation
    take_lock(state, b"2" * 16).release()
    assert again.attach(attach_request(b"2" * 16)).attach.epoch == 2


def test_attach_names_what_is_not_over(state: StateDir) -> None:
    manager = attached(state)
    for name in ("open", "ended", "ended with a row", "half ended"):
        manager.call(open_call(name, outputs=2))
    manager.call(ensure_call("ended with a row", 40))
    for name in ("ended", "ended with a row"):
        end(state, name)
    executor_log(state.records, "half ended")[1].set_terminal(Reason.STOP, 0)
    expected = {key_of(name) for name in ("open", "ended with a row", "half ended")}
    for one in (manager, manager_of(state)):
        assert set(one.attach(attach_request(b"1" * 16)).attach.keys) == expected


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"page_size": 32}, "page size"),
        ({"kv_dtype": "float32"}, "element type"),
        ({"layers": 2}, "page shape"),
        ({"max_model_len": 1024}, "context length"),
        ({"rows": 9}, "number of rows"),
    ],
)
def test_another_geometry_is_refused_while_there_are_records(
    state: StateDir, wrong: dict[str, object], named: str
) -> None:
    manager = attached(state)
    manager.call(open_call("a"))
    reply = manager.attach(attach_request(b"1" * 16, **wrong))
    assert reason(reply) == kv.ERROR_REASON_WRONG_MODEL
    assert named in reply.error.message and "--discard" in reply.error.message
    executor_log(state.records, "a")
    end(state, "a")
    manager.call(forget_call("a"))
    assert manager.attach(attach_request(b"1" * 16, **wrong)).attach.pool_is_new


def test_another_model_is_refused_and_smaller_demands_are_not(state: StateDir) -> None:
    manager = attached(state)
    manager.call(open_call("a"))
    request = attach_request(b"1" * 16)
    request.fingerprint = "cd" * 32
    assert reason(manager.attach(request)) == kv.ERROR_REASON_WRONG_MODEL
    assert not manager.attach(attach_request(b"1" * 16, max_model_len=100, rows=2)).attach.pool_is_new


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_dtype": "float8"},
        {"kv_dtype": "float16"},
        {"rows": 0},
        {"page_size": 0},
        {"layout_id": 2},
        {"layout_id": 4},
    ],
)
def test_a_geometry_with_holes_is_invalid(state: StateDir, wrong: dict[str, object]) -> None:
    manager = manager_of(state)
    take_lock(state, b"1" * 16).release()
    assert reason(manager.attach(attach_request(b"1" * 16, **wrong))) == kv.ERROR_REASON_INVALID
    request = attach_request(b"1" * 16)
    request.fingerprint = "no hex"
    assert reason(manager.attach(request)) == kv.ERROR_REASON_INVALID


def test_a_pool_that_does_not_fit_is_refused(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = manager_of(state)
    take_lock(state, b"1" * 16).release()
    monkeypatch.setattr(pools, "available_bytes", lambda root: 1 << 16)
    reply = manager.attach(attach_request(b"1" * 16))
    assert reason(reply) == kv.ERROR_REASON_NO_MEMORY and "--kv-memory" in reply.error.message
    monkeypatch.undo()
    assert manager.attach(attach_request(b"1" * 16)).attach.pool_is_new


def test_when_the_disk_fills_up_while_a_pool_is_made_nothing_stale_is_served(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = attached(state)
    real = pools._make_file

    def full(path: Path, size: int, backed: bool) -> None:
        if path == state.pool:
            raise OSError(28, "No space left on device")
        real(path, size, backed)

    monkeypatch.setattr(pools, "_make_file", full)
    assert reason(manager.attach(attach_request(b"1" * 16, rows=16))) == kv.ERROR_REASON_NO_MEMORY
    monkeypatch.undo()
    # The old pool's files are gone: it must not be taken for one that is there.
    reply = manager.attach(attach_request(b"1" * 16))
    assert reply.attach.pool_is_new and state.tables.exists() and state.pool.exists()


# --- open ---


def test_open_twice_is_open_once(state: StateDir) -> None:
    manager = attached(state)
    first, again = manager.call(open_call("a")), manager.call(open_call("a"))
    assert (first.open.existed, again.open.existed) == (False, True)
    assert first.open.key == again.open.key == key_of("a")
    assert reason(manager.call(open_call("a", digest=b"other"))) == kv.ERROR_REASON_ALREADY_EXISTS
    assert manager.stats(True).records == 1


@pytest.mark.parametrize(
    "wrong", [{"prompt": []}, {"max_tokens": 0}, {"digest": b""}, {"outputs": 0}, {"outputs": 1025}]
)
def test_a_record_with_holes_is_invalid(state: StateDir, wrong: dict[str, object]) -> None:
    manager = attached(state)
    call = kv.Call(open=kv.OpenRequest(record=record("a")))
    for name, value in wrong.items():
        call.open.record.ClearField(name)  # type: ignore[arg-type]
        if value:
            setattr(call.open.record, name, value)
    assert reason(manager.call(call)) == kv.ERROR_REASON_INVALID
    assert not list(state.records.iterdir())


def test_what_could_never_run_is_too_large(state: StateDir) -> None:
    manager = attached(state)  # rows of 512 tokens
    assert manager.call(open_call("a", prompt=500, max_tokens=13)).HasField("open")
    assert reason(manager.call(open_call("b", prompt=500, max_tokens=14))) == kv.ERROR_REASON_TOO_LARGE


def test_quota(state: StateDir) -> None:
    manager = attached(state, quota=8192)
    manager.call(open_call("a"))
    assert reason(manager.call(open_call("b"))) == kv.ERROR_REASON_QUOTA


# --- the end of a record ---


def test_forget_wants_an_end_and_no_rows(state: StateDir) -> None:
    manager = attached(state)
    manager.call(open_call("a"))
    row = manager.call(ensure_call("a", 40)).ensure
    assert reason(manager.call(forget_call("a"))) == kv.ERROR_REASON_INVALID
    manager.call(close_call("a", row.row_generation))
    assert reason(manager.call(forget_call("a"))) == kv.ERROR_REASON_INVALID
    end(state, "a")
    assert manager.call(forget_call("a")).HasField("forget")
    assert manager.call(forget_call("a")).HasField("forget")
    assert not list(state.records.iterdir())


def test_records_expire_a_ttl_after_their_end(state: StateDir) -> None:
    clock = Clock()
    manager = attached(state, clock=clock, ttl=60)
    manager.call(open_call("a"))
    for _ in range(3):
        clock.now += 100
        manager.sweep()
    assert manager.stats(True).records == 1
    end(state, "a")
    clock.now += 1
    manager.sweep()
    clock.now += 59
    manager.sweep()
    assert manager.stats(True).records == 1
    clock.now += 1
    manager.sweep()
    assert manager.stats(True).records == 0 and not list(state.records.iterdir())


def test_rows_of_an_expired_record_go_only_with_proof_that_its_executor_is_dead(state: StateDir) -> None:
    clock = Clock()
    manager = attached(state, b"1" * 16, clock=clock, ttl=1)
    alive = take_lock(state, b"1" * 16)
    manager.call(open_call("a"))
    manager.call(ensure_call("a", 40))
    end(state, "a")
    for _ in range(4):
        clock.now += 2
        manager.sweep()
    assert manager.stats(True).rows == 1 and manager.stats(True).records == 1
    alive.release()
    clock.now += 2
    manager.sweep()
    stats = manager.stats(False)
    assert (stats.rows, stats.records, stats.free_pages) == (0, 0, stats.pages)
    take_lock(state, b"2" * 16)  # the manager did not keep it


def test_a_new_epoch_frees_the_rows_of_a_damaged_record(state: StateDir) -> None:
    manager = attached(state, b"1" * 16)
    manager.call(open_call("a"))
    manager.call(ensure_call("a", 40))
    (state.records / f"{key_of('a')}.log").unlink()
    manager = manager_of(state)
    assert manager.stats(False).rows == 1
    take_lock(state, b"2" * 16).release()
    assert not manager.attach(attach_request(b"2" * 16)).attach.keys
    assert manager.stats(False).rows == 0 and manager.core is not None and manager.core.check_integrity() == []


# --- looks ---


def test_stats_before_there_is_a_pool(state: StateDir) -> None:
    manager = manager_of(state)
    stats = manager.stats(False)
    assert (stats.pages, stats.epoch, stats.incarnation) == (0, 0, manager.incarnation)
    assert manager.sweep() == 0


def test_stats_count_what_is_free_cached_and_shared(state: StateDir) -> None:
    manager = attached(state)
    for name in "ab":
        manager.call(open_call(name))
        row = manager.call(ensure_call(name, 40)).ensure
        executor_log(state.records, name)[0].set_progress(40, 40)
        manager.sweep()
    stats = manager.stats(True)
    assert (stats.pages, stats.rows, stats.records, stats.executor_attached) == (40, 2, 2, True)
    assert stats.shared_pages == 40 // PAGE_SIZE == row.cached_tokens // PAGE_SIZE
    assert stats.free_pages == 40 - 3 - 1 and stats.cached_pages == 0
    assert (stats.prefix_hit_tokens, stats.prefix_query_tokens) == (32, 80)
    manager.call(close_call("b", row.row_generation))
    assert manager.stats(True).shared_pages == 0
    assert manager.call(kv.Call()).error.reason == kv.ERROR_REASON_INVALID


# --- forks and growth ---


def forked(state: StateDir, manager: Manager) -> tuple[kv.EnsureResponse, kv.ForkResponse]:
    """Output 0 has computed its 40 tokens, and output 1 is its fork."""
    manager.call(open_call("a", outputs=2))
    parent = manager.call(ensure_call("a", 41)).ensure
    executor_log(state.records, "a")[0].set_progress(40, 40)
    ask = kv.ForkRequest(
        key=key_of("a"), index=1, from_index=0, from_row_generation=parent.row_generation, length=40, capacity=41
    )
    return parent, manager.call(kv.Call(fork=ask)).fork


def test_a_fork_says_what_to_copy(state: StateDir) -> None:
    manager = attached(state)
    parent, child = forked(state, manager)
    assert (child.shared_tokens, child.capacity, child.copy.tokens) == (32, 48, 8)
    assert manager.core is not None and manager.core.tables is not None
    tail = int(manager.core.tables.row_entry[parent.row, 2])
    assert (child.copy.page, child.copy.page_generation) == (tail & 0xFFFFFFFF, tail >> 32)
    assert manager.stats(True).shared_pages == 2


def test_rows_grow_by_columns(state: StateDir) -> None:
    manager = attached(state)
    parent, child = forked(state, manager)
    ask = kv.EnsureRowsRequest(
        rows=[parent.row, child.row, 7],
        row_generations=[parent.row_generation, child.row_generation, 3],
        capacities=[49, 60, 16],
        headrooms=[0, 16, 0],
    )
    assert list(manager.call(kv.Call(ensure_rows=ask)).ensure_rows.capacities) == [64, 80, 0]
    ask.headrooms.pop()
    assert reason(manager.call(kv.Call(ensure_rows=ask))) == kv.ERROR_REASON_INVALID


def test_an_executor_two_versions_ahead_is_refused(state: StateDir) -> None:
    manager = manager_of(state)
    take_lock(state, b"1" * 16).release()
    request = attach_request(b"1" * 16)
    request.protocol = PROTOCOL + 2
    refused = manager.attach(request)
    assert reason(refused) == kv.ERROR_REASON_PROTOCOL and "upgrade the kvmanager" in refused.error.message
    request.protocol = PROTOCOL + 1
    assert manager.attach(request).attach.pool_is_new
