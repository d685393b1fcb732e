"""The pool's files: made, grown as used, adopted, or refused with what to do."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from kvmanager import pool as pools
from kvmanager.errors import Refusal, Refused
from kvmanager.layout import HEADER_WORDS, Geometry, Header, KvDtype, Tables
from kvmanager.pool import EXTENT, CannotAdopt
from kvmanager.service import Manager
from pagehold.runtime.statedir import StateDir
from tests.unit.kvmanager.files import FINGERPRINT, attached, ensure_call, executor_log, manager_of, open_call

MIB = 1 << 20


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return StateDir.prepare(tmp_path / "state")


def geometry(pages: int = 0, page_bytes: int = 2048) -> Geometry:
    """Pages of `page_bytes` in one layer with one head."""
    return Geometry(
        pages=pages,
        rows=4,
        page_size=16,
        layers=page_bytes // 2048,
        kv_heads=1,
        head_dim=32,
        kv_dtype=KvDtype.BFLOAT16,
        layout_id=1,
        max_model_len=256,
    )


def poke(state: StateDir, word: Header, value: int) -> None:
    words = np.memmap(state.tables, np.uint64, "r+", shape=(HEADER_WORDS,))
    words[word] = value
    words.flush()


def test_a_pool_is_adopted_as_it_was_left(state: StateDir) -> None:
    assert pools.adopt(state) is None
    made = pools.create(state, geometry(20), FINGERPRINT)
    made.tables.header[Header.EPOCH] = 7
    found = pools.adopt(state)
    assert found is not None
    assert found.geometry == made.geometry == geometry(20)
    assert (found.fingerprint, found.word(Header.EPOCH)) == (FINGERPRINT, 7)
    assert state.pool.stat().st_size == 20 * 2048


def test_memory_is_put_behind_the_pool_only_as_pages_are_used(state: StateDir) -> None:
    page_bytes = 64 * 2048
    pages = 3 * EXTENT // page_bytes
    pool = pools.create(state, geometry(pages, page_bytes), FINGERPRINT)
    assert state.pool.stat().st_blocks == 0
    per_extent = EXTENT // page_bytes
    assert pool.back(1) == per_extent
    assert EXTENT <= state.pool.stat().st_blocks * 512 < EXTENT + page_bytes  # a disk adds blocks of its own
    assert pool.back(per_extent - 1) == per_extent
    assert pool.back(per_extent) == 2 * per_extent
    found = pools.adopt(state)
    assert found is not None and found.back(0) == 2 * per_extent


def test_the_last_extent_ends_with_the_pool(state: StateDir) -> None:
    pool = pools.create(state, geometry(20), FINGERPRINT)
    assert pool.back(0) == 20
    assert state.pool.stat().st_size == 20 * 2048


def test_an_extent_that_cannot_be_had_makes_the_pool_smaller(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = 64 * 2048
    pool = pools.create(state, geometry(2 * EXTENT // page_bytes, page_bytes), FINGERPRINT)
    pool.back(0)

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert pool.back(EXTENT // page_bytes) == EXTENT // page_bytes


def test_what_does_not_fit_is_refused_with_what_to_choose(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="choose a --kv-memory of at least 4096 bytes") as found:
        pools.fitting(state, geometry(), 4095)
    assert found.value.reason is Refusal.NO_MEMORY
    monkeypatch.setattr(pools, "available_bytes", lambda root: 64 * MIB)
    assert pools.fitting(state, geometry(), 32 * MIB).pages == 32 * MIB // 2048
    with pytest.raises(Refused, match=r"does not fit: 0.06 GiB are left .* smaller --kv-memory") as found:
        pools.fitting(state, geometry(), 64 * MIB)
    assert found.value.reason is Refusal.NO_MEMORY


def test_a_pool_makes_way_for_the_one_in_its_place(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pools.create(state, geometry(32 * MIB // 2048), FINGERPRINT)
    pool.back(pool.geometry.pages - 1)
    monkeypatch.setattr(pools, "available_bytes", lambda root: 8 * MIB)
    assert pools.fitting(state, geometry(), 34 * MIB).pages == 34 * MIB // 2048
    with pytest.raises(Refused):
        pools.fitting(state, geometry(), 41 * MIB)


def test_a_full_tmpfs_leaves_the_old_files(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    pools.create(state, geometry(20), FINGERPRINT)
    before = state.tables.read_bytes()

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        pools.create(state, geometry(30), FINGERPRINT)
    assert state.tables.read_bytes() == before and state.pool.exists()
    assert sorted(path.name for path in state.root.iterdir()) == ["pool", "records", "tables"]


def test_half_made_files_are_removed(state: StateDir) -> None:
    (state.root / "tables.new").write_bytes(b"x" * 100)
    state.pool.write_bytes(b"x")
    assert pools.adopt(state) is None
    assert [path.name for path in state.root.iterdir()] == ["records"]


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (Header.MAGIC, 5, "not a Pagehold header"),
        (Header.READY, 0, "not a Pagehold header"),
        (Header.LAYOUT, 99, "has layout version 99, this is 3"),
        (Header.BOOT_ID, 1, "before the last boot"),
        (Header.PAGES, 21, "wrong length"),
        (Header.PAGES, 1 << 60, "wrong length"),
        (Header.PAGE_BYTES, 1, "wrong page size"),
        (Header.KV_DTYPE, 9, "is damaged"),
        (Header.POOL_BYTES, 1 << 40, "is not the pool of"),
        (Header.POOL_KIND, 1, "wrong kind of pool"),
    ],
)
def test_a_header_that_is_not_ours_is_refused(state: StateDir, word: Header, value: int, message: str) -> None:
    pools.create(state, geometry(20), FINGERPRINT)
    poke(state, word, value)
    with pytest.raises(CannotAdopt, match=message) as found:
        pools.adopt(state)
    assert "--discard" in str(found.value)


@pytest.mark.parametrize("size", [0, 100, HEADER_WORDS * 8, 4000])
def test_cut_off_tables_are_refused(state: StateDir, size: int) -> None:
    pools.create(state, geometry(20), FINGERPRINT)
    os.truncate(state.tables, size)
    with pytest.raises(CannotAdopt, match="--discard"):
        pools.adopt(state)


def test_tables_without_their_pool_and_records_without_tables_are_refused(state: StateDir) -> None:
    pools.create(state, geometry(20), FINGERPRINT)
    state.pool.unlink()
    with pytest.raises(CannotAdopt, match=r"pool is gone; .*--discard"):
        pools.adopt(state)
    state.pool.write_bytes(b"another")
    with pytest.raises(CannotAdopt, match="is not the pool of"):
        pools.adopt(state)
    state.tables.unlink()
    (state.records / "aa.req").write_bytes(b"")
    with pytest.raises(CannotAdopt, match=r"tables is gone; .*--discard"):
        pools.adopt(state)


def test_discard_leaves_nothing(state: StateDir) -> None:
    pools.create(state, geometry(20), FINGERPRINT)
    (state.records / "aa.req").write_bytes(b"")
    (state.records / "bb.log.damaged").write_bytes(b"")
    (state.root / "tables.new").write_bytes(b"")
    pools.discard(state)
    assert not list(state.records.iterdir())
    assert pools.adopt(state) is None


def busy(state: StateDir) -> Manager:
    """Rows, shared pages, cached pages."""
    manager = attached(state)
    assert manager.core is not None
    for name in ("a", "b", "c"):
        assert manager.call(open_call(name)).HasField("open")
        granted = manager.call(ensure_call(name, 60)).ensure
        assert granted.capacity >= 60
        executor_log(state.records, name)[0].set_progress(40, 40)
        manager.sweep()
    assert manager.core.pages.index.snapshot()
    return manager


@pytest.mark.parametrize("seed", range(30))
def test_tables_with_words_that_changed_are_refused_or_harmless(state: StateDir, seed: int) -> None:
    """Whatever the damage, a manager says so with a remedy, or serves tables in which nothing is wrong."""
    busy(state)
    rng = random.Random(seed)
    words = np.memmap(state.tables, np.uint64, "r+")
    header = words[:HEADER_WORDS]
    shape = [int(header[word]) for word in (Header.PAGES, Header.ROWS, Header.ROW_ENTRIES, Header.PAGE_SIZE)]
    used = np.flatnonzero(words[HEADER_WORDS:]) + HEADER_WORDS
    assert len(words) * 8 == Tables.nbytes(*shape)
    for place in rng.sample(used.tolist(), 3):
        damage = rng.choice(["flip", "zero", "ones", "draw"])
        flipped = int(words[place]) ^ 1 << rng.randrange(64)
        words[place] = {"flip": flipped, "zero": 0, "ones": (1 << 64) - 1, "draw": rng.getrandbits(64)}[damage]
    try:
        manager = manager_of(state)
    except CannotAdopt as error:
        assert "is damaged" in str(error) and "--discard" in str(error)
    else:
        assert manager.core is not None and manager.core.check_integrity() == []
