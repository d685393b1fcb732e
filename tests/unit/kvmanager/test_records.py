"""Record files: written whole or not at all, found again, counted, forgotten."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from kvmanager import records as records_module
from kvmanager.errors import Refusal, Refused
from kvmanager.layout import Reason, RequestLog
from kvmanager.records import Records
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime import failpoint
from tests.unit.kvmanager.files import FINGERPRINT, executor_log, key_of, record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def records_in(folder: Path, quota: int = 1 << 20, **hit: object) -> Records:
    return Records(folder, FINGERPRINT, quota, failpoint.hit)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def end(folder: Path, name: str) -> None:
    for output in executor_log(folder, name):
        output.set_terminal(Reason.LENGTH, output.known - output.prompt_length)


def test_a_record_is_what_the_next_manager_finds(folder: Path) -> None:
    key = records_in(folder).write(record("a", prompt=30, outputs=2, logprobs=True, seed=9))
    assert key == key_of("a") and names(folder) == {f"{key}.req", f"{key}.log"}
    records = records_in(folder)
    assert len(records) == 1 and records.find(record("a")) == key
    assert kv.RequestRecord.FromString((folder / f"{key}.req").read_bytes()).seed == 9
    source = records.source(key)
    assert source is not None
    for output in source.outputs:
        assert (output.computed, output.known, output.prompt_length, output.capacity) == (0, 30, 30, 50)
        assert output.tokens[:30].tolist() == list(range(100, 130))
        assert not output.ended and output.logprobs is not None


def test_the_manager_reads_what_the_executor_writes_and_cannot_write_it(folder: Path) -> None:
    records = records_in(folder)
    key = records.write(record("a"))
    executor_log(folder, "a")[0].set_progress(7, 41)
    source = records.source(key)
    assert source is not None and (source.outputs[0].computed, source.outputs[0].known) == (7, 41)
    with pytest.raises(ValueError, match="read-only"):
        source.outputs[0].set_progress(0, 0)


def test_same_key_other_body_is_refused(folder: Path) -> None:
    records = records_in(folder)
    records.write(record("a"))
    assert records.find(record("b")) is None
    with pytest.raises(Refused) as found:
        records.find(record("a", digest=b"other"))
    assert found.value.reason is Refusal.ALREADY_EXISTS


def test_tenants_have_names_of_their_own(folder: Path) -> None:
    records = records_in(folder)
    records.write(record("a", tenant="one"))
    assert records.find(record("a", tenant="two", digest=b"other")) is None


def test_quota_counts_both_files_and_gives_back_what_is_forgotten(folder: Path) -> None:
    records = records_in(folder, quota=16384)  # two records of two blocks
    records.write(record("a"))
    records.write(record("b"))
    with pytest.raises(Refused, match="--record-quota") as found:
        records.write(record("c"))
    assert found.value.reason is Refusal.QUOTA and len(names(folder)) == 4
    with pytest.raises(Refused):
        records_in(folder, quota=16384).write(record("c"))  # the next manager counts the same
    records.forget(key_of("a"))
    records.write(record("c"))
    assert len(records) == 2


@pytest.mark.parametrize("call", ["posix_fallocate", "write"])
def test_a_full_tmpfs_refuses_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    records = records_in(folder)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    target = (os, "posix_fallocate") if call == "posix_fallocate" else (Path, "write_bytes")
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        with pytest.raises(Refused, match="No space left") as found:
            records.write(record("a"))
    assert found.value.reason is Refusal.QUOTA and not names(folder) and not len(records)
    records.write(record("a"))


@pytest.mark.parametrize("point", ["kvmanager.open.log_written", "kvmanager.open.before_rename"])
def test_a_death_before_the_rename_leaves_nothing_that_counts(folder: Path, point: str) -> None:
    failpoint.arm(f"{point}=error")
    try:
        with pytest.raises(failpoint.FailpointError):
            records_in(folder).write(record("a"))
    finally:
        failpoint.arm("")
    assert names(folder)
    records = records_in(folder)
    assert not len(records) and not names(folder)
    records.write(record("a"))


def test_a_death_after_the_rename_leaves_the_record(folder: Path) -> None:
    failpoint.arm("kvmanager.open.after=error")
    try:
        with pytest.raises(failpoint.FailpointError):
            records_in(folder).write(record("a"))
    finally:
        failpoint.arm("")
    assert records_in(folder).find(record("a")) == key_of("a")


def test_a_request_that_is_no_request_is_refused_before_anything_is_written(folder: Path) -> None:
    with pytest.raises(Refused) as found:
        records_in(folder).write(record("a", request=b"\xff\xff\xff"))
    assert found.value.reason is Refusal.INVALID and not names(folder)


def test_ended_records_expire_counted_from_when_their_end_was_seen(folder: Path) -> None:
    records = records_in(folder)
    records.write(record("a", outputs=2))
    records.write(record("b"))
    assert records.expired(0.0, ttl=10) == []
    executor_log(folder, "a")[0].set_terminal(Reason.STOP, 0)
    assert records.expired(5.0, ttl=10) == [] and not records.ended(key_of("a"))
    end(folder, "a")
    assert records.ended(key_of("a")) and records.unfinished_keys == {key_of("b")}
    assert records.expired(50.0, ttl=10) == []
    assert records.expired(59.9, ttl=10) == []
    assert records.expired(60.0, ttl=10) == [key_of("a")]


def test_ended_records_are_not_kept_mapped_and_can_still_be_read(folder: Path) -> None:
    records = records_in(folder)
    keys = [records.write(record(name)) for name in "ab"]
    for name in "ab":
        end(folder, name)
    records.expired(0.0, ttl=10)

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(".log")

    before = mapped()
    records.unmap_ended({keys[1]})
    assert mapped() == before - 1
    source = records.source(keys[0])
    assert source is not None and source.outputs[0].ended and records.unfinished_keys == set()


def test_more_records_are_adopted_than_files_may_be_open(folder: Path) -> None:
    records = records_in(folder, 1 << 30)
    for number in range(100):
        records.write(record(str(number)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(used) + 10, hard))
        adopted = records_in(folder, 1 << 30)
        adopted.write(record("another"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(adopted) == 101
    assert not [name for name in names(folder) if "damaged" in name]


def test_for_want_of_descriptors_no_record_is_set_aside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records_in(folder).write(record("a"))
    before = names(folder)

    def scarce(*arguments: object, **named: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(records_module, "map_shared", scarce)
    with pytest.raises(OSError, match="Too many open files"):
        records_in(folder)
    assert names(folder) == before


def test_forget_removes_both_files_and_may_be_repeated(folder: Path) -> None:
    records = records_in(folder)
    key = records.write(record("a"))
    writer = executor_log(folder, "a")[0]
    records.forget(key)
    records.forget(key)
    assert not names(folder) and records.source(key) is None
    writer.set_progress(1, 40)  # into a dead inode
    records.write(record("a"))
    source = records.source(key)
    assert source is not None and source.outputs[0].computed == 0


def _no_log(log: Path) -> None:
    log.unlink()


def _empty_log(log: Path) -> None:
    log.write_bytes(b"")


def _short_log(log: Path) -> None:
    os.truncate(log, log.stat().st_size - 64)


def _foreign_log(log: Path) -> None:
    log.write_bytes(b"x" * log.stat().st_size)


def _torn_request(log: Path) -> None:
    request = log.with_suffix(".req")
    request.write_bytes(request.read_bytes()[:-3])


def _progress_beyond_the_log(log: Path) -> None:
    RequestLog(memoryview(np.memmap(log, np.uint8, "r+"))).outputs[0].set_progress(10, 1 << 20)


def _computed_beyond_known(log: Path) -> None:
    RequestLog(memoryview(np.memmap(log, np.uint8, "r+"))).outputs[0].set_progress(50, 41)


def _terminal_of_no_reason(log: Path) -> None:
    RequestLog(memoryview(np.memmap(log, np.uint8, "r+"))).outputs[0].words[1] = 1 | 200 << 8


def _end_beyond_known(log: Path) -> None:
    RequestLog(memoryview(np.memmap(log, np.uint8, "r+"))).outputs[0].set_terminal(Reason.STOP, 5)


@pytest.mark.parametrize(
    "damage",
    [
        _no_log,
        _empty_log,
        _short_log,
        _foreign_log,
        _torn_request,
        _progress_beyond_the_log,
        _computed_beyond_known,
        _terminal_of_no_reason,
        _end_beyond_known,
    ],
)
def test_a_damaged_record_is_set_aside_and_all_others_are_served(folder: Path, damage: object) -> None:
    first = records_in(folder)
    keys = [first.write(record(name)) for name in "abc"]
    damage(folder / f"{keys[1]}.log")  # type: ignore[operator]
    records = records_in(folder)
    assert records.unfinished_keys == {keys[0], keys[2]}
    assert {name for name in names(folder) if name.startswith(keys[1])} == {
        f"{keys[1]}{suffix}.damaged" for suffix in ((".req",) if damage is _no_log else (".req", ".log"))
    }
    assert len(records_in(folder)) == 2
    records.write(record("b"))
    assert len(records_in(folder)) == 3
