"""Repairs a folder that nobody uses. No repair loses a token: tokens are in the logs, and K/V is computed again.

    a row that cannot be believed        is freed; its sequence computes its tokens again
    a page that cannot be believed       becomes free, of the next generation
    a file that was never finished       is removed
    a record that cannot be believed     is set aside under another name, as adoption does

Each is one store or one rename, so a death in between leaves less to repair.
"""

from __future__ import annotations

from typing import Final

from kvmanager import pool as pools
from kvmanager.findings import Finding
from kvmanager.fsck import Report, check_folder
from kvmanager.layout import NO_PAGE, PageState, RowState, Tables, generation_of, page_word, row_word
from kvmanager.records import set_aside
from pagehold.runtime.statedir import StateDir

_MOST_ROUNDS: Final = 8  # a freed page makes its rows stale; a record set aside makes its rows orphans


def repair(state: StateDir) -> tuple[list[Finding], Report]:
    """What was repaired, and what a check finds after it. The locks are held. Raises CannotAdopt."""
    repaired: list[Finding] = []
    report = check_folder(state)
    for _ in range(_MOST_ROUNDS):
        if not report.findings:
            break
        pool = pools.examine(state, writable=True)
        for finding in report.findings:
            _mend(state, finding, pool.tables if pool is not None else None)
        repaired += report.findings
        report = check_folder(state)
    return repaired, report


def _mend(state: StateDir, finding: Finding, tables: Tables | None) -> None:
    for name in finding.files:
        (state.root / name).unlink(missing_ok=True)
    if finding.record:
        set_aside(state.records, finding.record)
    if tables is None:
        return
    for row in finding.rows:
        tables.row_word[row] = row_word(RowState.FREE, 0, generation_of(tables.row_word[row]))
    for page in finding.pages:
        generation = generation_of(tables.page_word[page]) + 1 if page != NO_PAGE else 0
        tables.page_word[page] = page_word(PageState.FREE, generation)
