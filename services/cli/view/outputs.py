"""Outputs that have not ended, from the records in the state folder: so they are seen whoever is dead."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from kvmanager.logwords import OutputWords, read_outputs
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.statedir import StateDir

_MOST_RECORDS: Final = 2000  # that are new at one look, the newest of them


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a request, as far as it is."""

    key: str  # the request's, in the state folder
    request_id: str
    index: int
    words: OutputWords


class OpenOutputs:
    """Looks again and again: a request that has ended is not opened again, nor a record read twice."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._open: dict[str, tuple[int, str]] = {}  # key -> when its record was written, request id
        self._ended: set[str] = set()

    def look(self) -> list[Output]:
        """The latest request first."""
        written = self._records()
        self._ended &= written.keys()
        self._open = {key: known for key, known in self._open.items() if key in written}
        new = [key for key in written if key not in self._open and key not in self._ended]
        for key in sorted(new, key=written.__getitem__, reverse=True)[:_MOST_RECORDS]:
            self._open[key] = written[key], ""
        found = []
        for key, (when, request_id) in sorted(self._open.items(), key=lambda item: item[1][0], reverse=True):
            try:
                outputs = read_outputs(self._state.records / f"{key}.log")
                if all(output.ended for output in outputs):
                    self._ended.add(key)
                    del self._open[key]
                    continue
                if not request_id:
                    record = kv.RequestRecord.FromString((self._state.records / f"{key}.req").read_bytes())
                    request_id = record.request_id
                    self._open[key] = when, request_id
            except (OSError, ValueError, DecodeError):
                continue  # forgotten meanwhile, damaged, or of another release
            found += [Output(key, request_id, index, words) for index, words in enumerate(outputs) if not words.ended]
        return found

    def _records(self) -> dict[str, int]:
        """key -> when it was written, in nanoseconds; of those that have ended 0, which spares a look at each."""
        found = {}
        try:
            with os.scandir(self._state.records) as entries:
                for entry in entries:
                    key, dot, kind = entry.name.rpartition(".")
                    if dot and kind == "req":
                        found[key] = 0 if key in self._ended else _written(entry)
        except OSError:
            pass  # no state folder
        return found


def _written(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_mtime_ns
    except OSError:
        return 0  # forgotten meanwhile
