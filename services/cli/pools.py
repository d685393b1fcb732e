"""`pagehold pools`: the state folders of this user, and the removal of those whose owners are dead."""

from __future__ import annotations

import json
import sys
from typing import Any

from kvmanager.folders import Condition, Folder, Kept, find, is_ours, reclaim, survey
from kvmanager.vacant import InUse
from pagehold.runtime.settings import PoolsSettings
from pagehold.runtime.statedir import StateDir


def main(settings: PoolsSettings) -> int:
    """Returns the exit code: 1 when a named folder is none, or one could not be removed."""
    code = 0
    if settings.folders:
        states = [StateDir(path) for path in settings.folders]
        for state in states:
            if not is_ours(state):
                print(f"pagehold pools: {state.root} is no state folder of yours", file=sys.stderr)
                code = 1
        states = [state for state in states if is_ours(state)]
    else:
        states = find(settings.state_dir.absolute().parent)
    if settings.reclaim:
        return max(code, _reclaim(states, settings))
    folders = [survey(state) for state in states]
    print(json.dumps([_fields(folder) for folder in folders]) if settings.json_ else _render(folders))
    return code


def _reclaim(states: list[StateDir], settings: PoolsSettings) -> int:
    code, total, rows = 0, 0, list[dict[str, Any]]()
    for state in states:
        try:
            done = reclaim(state, settings.force)
        except InUse as busy:
            done = Kept(f"it is live: {busy.holder.value} uses it")
        except OSError as error:
            done, code = Kept(f"it cannot be removed: {error.strerror}"), 1
        if isinstance(done, Kept):
            rows.append({"path": str(state.root), "reclaimed": None, "kept": done.reason})
        else:
            total += done
            rows.append({"path": str(state.root), "reclaimed": done, "kept": None})
    if settings.json_:
        print(json.dumps({"folders": rows, "reclaimed": total}))
        return code
    for row in rows:
        print(f"{row['path']}: " + (f"kept, {row['kept']}" if row["kept"] else f"reclaimed {_mib(row['reclaimed'])}"))
    print(f"reclaimed {_mib(total)} of {len(rows)} folders")
    return code


def _fields(folder: Folder) -> dict[str, Any]:
    return {
        "path": str(folder.path),
        "live": folder.is_live,
        "held_by": [holder.name.lower() for holder in folder.holders],
        "manager_pid": folder.manager_pid,
        "executor_pid": folder.executor_pid,
        "age_seconds": round(folder.age_seconds, 1),
        "condition": folder.condition.value,
        "reason": folder.reason,
        "epoch": folder.epoch,
        "fingerprint": folder.fingerprint[:12],
        "pool_bytes": folder.pool_bytes,
        "device": folder.device,
        "device_bytes": folder.device_bytes,
        "tables_bytes": folder.tables_bytes,
        "records_bytes": folder.records_bytes,
        "records": folder.records,
        "unfinished": folder.unfinished,
    }


def _render(folders: list[Folder]) -> str:
    if not folders:
        return "no state folders; `pagehold up` makes one"
    lines = []
    for folder in folders:
        pids = f"kvmanager {folder.manager_pid or '-'}, executor {folder.executor_pid or '-'}"
        life = "live" if folder.is_live else "dead"
        lines.append(f"{folder.path}: {life}, {pids}, {_age(folder.age_seconds)} old")
        where = f"pool {_mib(folder.device_bytes)} on {folder.device}" if folder.device else ""
        sizes = f"{where or f'pool {_mib(folder.pool_bytes)}'}, tables {_mib(folder.tables_bytes)}"
        records = f"{folder.records} records ({folder.unfinished} not ended) {_mib(folder.records_bytes)}"
        lines.append(f"  {sizes}, {records}; epoch {folder.epoch}, model {folder.fingerprint[:12] or '-'}")
        if folder.condition is Condition.NO_TABLES and folder.nbytes:
            lines.append("  leftovers without tables")
        elif folder.reason:
            lines.append(f"  {folder.reason}")
    dead = [folder for folder in folders if not folder.is_live]
    if dead:
        size = _mib(sum(folder.nbytes for folder in dead))
        lines.append(f"dead folders hold {size}; `pagehold pools --reclaim` gives that back")
    return "\n".join(lines)


def _age(seconds: float) -> str:
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
