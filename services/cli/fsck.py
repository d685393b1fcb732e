"""`pagehold fsck`: checks a state folder, through its manager where one runs; mends it where nobody does.

Exit codes: 0 nothing is wrong, or all was repaired; 1 something is; 78 it cannot be checked.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Final

from kvmanager.findings import Finding
from kvmanager.folders import is_ours
from kvmanager.fsck import Report, check_folder
from kvmanager.pool import CannotAdopt
from kvmanager.repair import repair
from kvmanager.vacant import ALL, InUse, is_live, vacant
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.settings import FsckSettings
from pagehold.runtime.statedir import StateDir
from services.cli.manager import NoAnswer, ask

EXIT_FOUND: Final = 1
EXIT_CANNOT: Final = 78  # EX_CONFIG


class CannotCheck(Exception):
    """The message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Line:
    """One finding, as it is shown."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found, mended and looked at."""

    is_live: bool
    total: int  # findings left; a manager sends only the first of very many
    pages: int
    rows: int
    records: int
    findings: list[Line] = field(default_factory=list)
    repaired: list[Line] = field(default_factory=list)


def main(settings: FsckSettings) -> int:
    """Returns the exit code."""
    state = StateDir(settings.state_dir)
    try:
        outcome = _check(state, settings.repair)
    except (CannotCheck, CannotAdopt, NoAnswer, InUse) as error:
        print(f"pagehold fsck: {error}", file=sys.stderr)
        return EXIT_CANNOT
    except OSError as error:
        print(f"pagehold fsck: cannot read {state.root}: {error.strerror}", file=sys.stderr)
        return EXIT_CANNOT
    print(_to_json(state, outcome) if settings.json_ else _render(state, outcome))
    return EXIT_FOUND if outcome.total else 0


def _check(state: StateDir, wants_repair: bool) -> Outcome:
    if not state.root.is_dir():
        raise CannotCheck(f"there is no state folder {state.root}; see `pagehold pools`")
    if not is_ours(state):
        raise CannotCheck(f"{state.root} holds nothing of Pagehold's, or belongs to another user; see `pagehold pools`")
    if not wants_repair and is_live(state):
        return _ask_manager(state)
    with vacant(state, "--repair" if wants_repair else "fsck", ALL):
        repaired, report = repair(state) if wants_repair else ([], check_folder(state))
    return _of_folder(report, repaired)


def _of_folder(report: Report, repaired: list[Finding]) -> Outcome:
    return Outcome(
        is_live=False,
        total=len(report.findings),
        pages=report.pages,
        rows=report.rows,
        records=report.records,
        findings=[Line(one.kind.name, str(one)) for one in report.findings],
        repaired=[Line(one.kind.name, str(one)) for one in repaired],
    )


def _ask_manager(state: StateDir) -> Outcome:
    response = ask(state, lambda stub, seconds: stub.Fsck(kv.FsckRequest(), timeout=seconds, wait_for_ready=True))
    return Outcome(
        is_live=True,
        total=response.total,
        pages=response.pages,
        rows=response.rows,
        records=response.records,
        findings=[Line(one.kind, one.message) for one in response.findings],
    )


def _to_json(state: StateDir, outcome: Outcome) -> str:
    return json.dumps(
        {
            "state_dir": str(state.root),
            "live": outcome.is_live,
            "total": outcome.total,
            "findings": [{"kind": one.kind, "message": one.message} for one in outcome.findings],
            "repaired": [{"kind": one.kind, "message": one.message} for one in outcome.repaired],
            "pages": outcome.pages,
            "rows": outcome.rows,
            "records": outcome.records,
        }
    )


def _render(state: StateDir, outcome: Outcome) -> str:
    lines = [f"repaired {one.kind}: {one.message}" for one in outcome.repaired]
    lines += [f"{one.kind}: {one.message}" for one in outcome.findings]
    found = f"{outcome.total} findings" if outcome.total else "clean"
    if outcome.repaired:
        found += f", {len(outcome.repaired)} repaired"
    seen = f"{outcome.pages} pages, {outcome.rows} rows, {outcome.records} records"
    lines.append(f"{state.root} ({'live' if outcome.is_live else 'nobody uses it'}): {found}; looked at {seen}")
    if outcome.total:
        lines.append("stop everything, then `pagehold fsck --repair`" if outcome.is_live else "mend it with --repair")
    return "\n".join(lines)
