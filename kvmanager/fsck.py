"""The whole check: of a folder that nobody uses, or of a running manager between two calls.

K/V itself has no checksum: bytes that changed within a page, by themselves, are not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvmanager import pool as pools
from kvmanager.core import ManagerCore
from kvmanager.findings import Finding, FindingKind
from kvmanager.integrity import check_steps
from kvmanager.keys import words_key
from kvmanager.layout import PoolKind, RowState, Tables
from kvmanager.recordcheck import check_files, check_records
from kvmanager.records import Records
from kvmanager.stored import check_tables
from pagehold.runtime.statedir import StateDir


@dataclass(frozen=True, slots=True)
class Report:
    """What is wrong, and how much was looked at."""

    findings: list[Finding]
    pages: int = 0
    rows: int = 0  # in use
    records: int = 0


def check_manager(state: StateDir, core: ManagerCore, records: Records) -> Report:
    """A manager between two calls. Changes nothing."""
    findings = [finding for step in check_steps(core, orphans=True) for finding in step]
    findings += check_records(state.records, records)
    return Report(findings, core.pages.count - 1, len(_used_rows(core.tables)), len(records))


def check_folder(state: StateDir) -> Report:
    """The files of a folder whose locks are held. Changes nothing. Raises CannotAdopt for a header that is not ours."""
    pool, leftovers = pools.examine(state), list[Finding]()
    if pools.half_made(state).exists():
        leftovers.append(_leftover("tables.new", "are tables that were never finished"))
    if pool is None:
        if state.pool.exists():
            leftovers.append(_leftover("pool", "is a pool without tables"))
        return Report(leftovers + check_files(state.records, "", set()).findings)
    if pool.place.kind is not PoolKind.HOST and state.pool.exists():
        leftovers.append(_leftover("pool", "is a file, and the memory of this pool is a device's"))
    tables, used = pool.tables, _used_rows(pool.tables)
    records = check_files(state.records, pool.fingerprint, {words_key(tables.row_key[row]) for row in used})
    findings = check_tables(tables, records.sources.get, orphans=True)
    return Report(leftovers + records.findings + findings, len(tables.page_word) - 1, len(used), records.count)


def _used_rows(tables: Tables) -> list[int]:
    rows: list[int] = np.flatnonzero(tables.row_word & np.uint64(0xFF) != RowState.FREE).tolist()
    return rows


def _leftover(name: str, what: str) -> Finding:
    return Finding(FindingKind.FILE, f"{name} {what}", files=(name,))
