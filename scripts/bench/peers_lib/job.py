"""What the comparison hands to an engine's worker, and what the worker says back.

The worker is a process of its own, perhaps in an environment without Pagehold: this and all that a worker imports
besides its engine is standard library only. A job travels as a JSON file, notices come back as JSON lines.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Load:
    """One scenario as the worker sees it: a request file to read, a trace file to write."""

    name: str
    requests: str
    traces: str


@dataclass(frozen=True, slots=True)
class Job:
    """Paths are absolute."""

    dtype: str
    flags: tuple[str, ...]  # without their dashes
    model: str
    kv_memory: int  # bytes, for engines that own a cache
    most: int  # requests at once, of all loads
    loads: tuple[Load, ...]
    warm_up: str  # request file; its answers are thrown away
    scratch: str  # folder on disk, removed with all that is in it after the run
    shared: str  # the same, in memory
    spawned: float  # CLOCK_MONOTONIC when the worker's process was started
    timeout: float  # seconds that the start, and each load, may take

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        loads = tuple(Load(**load) for load in fields["loads"])
        return cls(**{**fields, "flags": tuple(fields["flags"]), "loads": loads})


class Stage(StrEnum):
    """A worker passes: root, ready, then begin and end, or refused, for each load, at its turn; or failed from
    anywhere."""

    ROOT = "root"  # pid: the engine's processes are this one and those below it; another one later on takes its place
    READY = "ready"  # seconds, version
    BEGIN = "begin"  # load
    END = "end"  # load
    REFUSED = "refused"  # load and reason: the engine cannot do this one
    FAILED = "failed"  # reason, one line


@dataclass(frozen=True, slots=True)
class Notice:
    """One line from a worker. Which fields are set is said at the stage."""

    stage: Stage
    pid: int = 0
    seconds: float = 0.0
    version: str = ""
    load: str = ""
    reason: str = ""

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Notice:
        fields = json.loads(line)
        return cls(**{**fields, "stage": Stage(fields["stage"])})


def write(path: Path, job: Job) -> None:
    path.write_text(job.to_json())


def read(path: Path) -> Job:
    return Job.from_json(path.read_text())
