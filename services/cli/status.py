"""`pagehold status`: what runs here, read from the state folder alone, so that it always answers."""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError

from kvmanager.geometry import read_shape
from kvmanager.keys import words_key
from kvmanager.layout import HEADER_WORDS, LOW32, NO_PAGE, U64, Header, RequestLog, RowState, Tables, index_of
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.settings import StatusSettings
from pagehold.runtime.statedir import StateDir
from services.cli.components import KINDS, Component, look

_MOST_RECORDS: Final = 2000  # looked at, the newest first


def main(settings: StatusSettings) -> int:
    """0, also when nothing runs."""
    found = collect(StateDir(settings.state_dir))
    print(json.dumps(found) if settings.json_ else render(found))
    return 0


def collect(state: StateDir) -> dict[str, Any]:
    """The keys that architecture and scripts rely on are always there."""
    tables = _read_tables(state)
    rows = _live_rows(tables) if tables is not None else {}
    return {
        "components": _components(state, tables),
        "pool": _pool(tables),
        "sequences": _sequences(state, rows),
    }


def _components(state: StateDir, tables: Tables | None) -> dict[str, dict[str, Any]]:
    """By name, those of one kind together."""
    return {one.name: _fields(one, tables) for one in look(state) if one.name in KINDS or not one.is_down}


def _fields(one: Component, tables: Tables | None) -> dict[str, Any]:
    if one.is_down:
        return {"pid": None, "state": one.state.label}
    found: dict[str, Any] = {
        "pid": one.pid,
        "state": one.state.label,
        "uptime_seconds": round(one.uptime_seconds, 1),
    }
    if one.name in ("kvmanager", "executor") and tables is not None:
        found["epoch"] = int(tables.header[Header.EPOCH])
    if one.name == "kvmanager":
        found["integrity_findings"] = one.findings
    return found


def _read_tables(state: StateDir) -> Tables | None:
    """A copy, so that nothing changes while it is looked at. None: there is no pool."""
    try:
        raw = state.tables.read_bytes()
    except OSError:
        return None
    if len(raw) < HEADER_WORDS * 8:
        return None
    header = np.frombuffer(raw, np.uint64, HEADER_WORDS)
    shape = read_shape(header)
    return Tables(memoryview(raw), *shape) if len(raw) == Tables.nbytes(*shape) else None


def _live_rows(tables: Tables) -> dict[tuple[str, int], U64]:
    """(key, output index) -> the row's entries."""
    live = np.flatnonzero(tables.row_word & np.uint64(0xFF) == RowState.LIVE).tolist()
    return {
        (words_key(tables.row_key[row]), index_of(int(tables.row_word[row]))): tables.row_entry[
            row, : int(tables.row_length[row])
        ]
        for row in live
    }


def _pool(tables: Tables | None) -> dict[str, int]:
    """`free` is what a new request could get: pages in no row, neither a sequence's nor a pinned prefix's."""
    if tables is None:
        return {"pages": 0, "free": 0, "shared": 0, "pinned": 0, "page_size": 0}
    pinned = _pages_of(tables, RowState.PINNED)
    held, counts = np.unique(np.concatenate([_pages_of(tables, RowState.LIVE), pinned]), return_counts=True)
    pages = len(tables.page_word) - 1
    return {
        "pages": pages,
        "free": pages - len(held),
        "shared": int(np.count_nonzero(counts > 1)),
        "pinned": len(np.unique(pinned)),
        "page_size": int(tables.page_tokens.shape[1]),
    }


def _pages_of(tables: Tables, state: RowState) -> U64:
    """Every page that a row in this state names, once for each row, u64 [n]."""
    rows = np.flatnonzero(tables.row_word & np.uint64(0xFF) == state).tolist()
    entries = [tables.row_entry[row, : int(tables.row_length[row])] for row in rows]
    pages: U64 = np.concatenate([np.zeros(0, np.uint64), *entries]) & np.uint64(LOW32)
    named: U64 = pages[pages != NO_PAGE]
    return named


def _sequences(state: StateDir, rows: dict[tuple[str, int], U64]) -> list[dict[str, Any]]:
    """Outputs that have not ended, the newest requests first."""
    try:
        files = sorted(state.records.glob("*.req"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    except OSError:
        return []
    found = []
    for path in files[:_MOST_RECORDS]:
        try:
            log = RequestLog(memoryview(path.with_suffix(".log").read_bytes()))
            if all(output.ended for output in log.outputs):
                continue
            record = kv.RequestRecord.FromString(path.read_bytes())
        except (OSError, ValueError, DecodeError):
            continue  # forgotten meanwhile, or damaged: fsck says so
        for index, output in enumerate(log.outputs):
            if not output.ended:
                entries = rows.get((path.stem, index))
                found.append(
                    {
                        "request_id": record.request_id,
                        "index": index,
                        "state": "waiting" if entries is None else "running",
                        "prompt_tokens": output.prompt_length,
                        "computed": output.computed,
                        "known": output.known,
                        "pages": 0 if entries is None else len(entries),
                    }
                )
    return found


def render(found: dict[str, Any]) -> str:
    lines = [f"{'component':<18}{'state':<10}{'pid':>8}{'uptime':>10}{'epoch':>7}"]
    more = any(name.startswith("frontend-") for name in found["components"])
    for name, one in found["components"].items():
        if name == "frontend" and not one["pid"] and more:
            continue  # another one has come in its place
        uptime = f"{one['uptime_seconds']:.0f} s" if "uptime_seconds" in one else "-"
        lines.append(f"{name:<18}{one['state']:<10}{one['pid'] or '-':>8}{uptime:>10}{one.get('epoch', '-'):>7}")
    pool = found["pool"]
    lines.append(
        f"pages: {pool['pages']} of {pool['page_size']} tokens, "
        f"{pool['free']} free, {pool['shared']} shared, {pool['pinned']} pinned"
    )
    running = sum(one["state"] == "running" for one in found["sequences"])
    lines.append(f"sequences: {running} running, {len(found['sequences']) - running} waiting")
    if wrong := found["components"]["kvmanager"].get("integrity_findings"):
        lines.append(f"integrity: {wrong} findings; run pagehold fsck")
    return "\n".join(lines)
