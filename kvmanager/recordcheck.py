"""Records and logs against each other: of a folder that nobody uses by its files, of a live manager by its memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from kvmanager.findings import Finding, FindingKind
from kvmanager.keys import request_key
from kvmanager.layout import RequestLog
from kvmanager.prefix import root_hash
from kvmanager.records import Records
from kvmanager.source import Source
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.mapping import map_shared
from pagehold.v1 import inference_pb2 as api


@dataclass(frozen=True, slots=True)
class RecordFiles:
    """What a folder of records holds."""

    count: int
    unfinished: int  # with an output that has not ended
    sources: dict[str, Source]  # of those that were wanted, and are sound
    findings: list[Finding]


def map_log(path: Path) -> RequestLog:
    """Read-only. Raises OSError or ValueError."""
    return RequestLog(map_shared(path, writable=False))


def check_files(folder: Path, fingerprint: str, wanted: set[str]) -> RecordFiles:
    """Reads every record. wanted: keys whose logs are kept; a process can map only so many at once."""
    names = _names(folder)
    keys = sorted(name.removesuffix(".req") for name in names if name.endswith(".req"))
    findings, sources, unfinished = _strays(names), dict[str, Source](), 0
    for key in keys:
        try:
            source = _read(folder, key, fingerprint)
        except FileNotFoundError:
            findings.append(Finding(FindingKind.LOG, f"the record {key} has no log", record=key))
        except (OSError, ValueError, DecodeError) as error:
            findings.append(Finding(FindingKind.LOG, f"the record {key} is damaged: {error}", record=key))
        else:
            unfinished += not all(output.ended for output in source.outputs)
            if key in wanted:
                sources[key] = source
    return RecordFiles(len(keys), unfinished, sources, findings)


def check_records(folder: Path, records: Records) -> list[Finding]:
    """Between two calls: no file is half-made then. Logs of records that have ended are not mapped again."""
    names, findings = _names(folder), list[Finding]()
    for key, source in records.mapped():
        if source is not None and not all(output.is_sound for output in source.outputs):
            findings.append(Finding(FindingKind.LOG, f"the log of {key} contradicts itself", record=key))
        if f"{key}.req" not in names:
            findings.append(Finding(FindingKind.LOG, f"the record {key} has lost its file", record=key))
        elif f"{key}.log" not in names:
            findings.append(Finding(FindingKind.LOG, f"the record {key} has no log", record=key))
    return findings + _strays(names)


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def _strays(names: set[str]) -> list[Finding]:
    """Files of records that were never made."""
    found = []
    for name in sorted(names):
        path = f"records/{name}"
        if name.endswith(".tmp"):
            found.append(Finding(FindingKind.FILE, f"{path} is a record that was never finished", files=(path,)))
        elif name.endswith(".log") and f"{name.removesuffix('.log')}.req" not in names:
            found.append(Finding(FindingKind.LOG, f"{path} is a log without a record", files=(path,)))
    return found


def _read(folder: Path, key: str, fingerprint: str) -> Source:
    """Raises OSError, ValueError or DecodeError."""
    record = kv.RequestRecord.FromString((folder / f"{key}.req").read_bytes())
    request = api.GenerateRequest.FromString(record.request)
    log = map_log(folder / f"{key}.log")
    if key != request_key(record.tenant, record.request_id):
        raise ValueError("it is another request's")
    if not record.outputs or len(log.outputs) != record.outputs:
        raise ValueError(f"its log has {len(log.outputs)} outputs, itself {record.outputs}")
    prompt = np.fromiter(record.prompt, np.uint32, len(record.prompt))
    for output in log.outputs:
        if output.prompt_length != len(prompt) or not np.array_equal(output.tokens[: len(prompt)], prompt):
            raise ValueError("its log has another prompt")
        if not output.is_sound:
            raise ValueError("its log contradicts itself")
    return Source(log.outputs, root_hash(fingerprint, record.tenant, request.cache_salt))
