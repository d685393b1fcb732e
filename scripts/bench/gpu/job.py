"""What a part is given: the device, the options, and where results go."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gpu.report import Figure, Result, encode

if TYPE_CHECKING:
    from gpu.bed import Bed

REPOSITORY: Final = Path(__file__).resolve().parents[3]
LIMIT_SECONDS: Final = 590.0  # of a part
WORK: Final = Path("/tmp/pagehold-gpu-check")


def python_path(*folders: Path) -> str:
    """For a child: these folders before those that this process was given, where packages may lie."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


class PartError(Exception):
    """A part cannot run here; one sentence that says what is missing."""


@dataclass(frozen=True, slots=True)
class Options:
    """From the command line, the same for all parts."""

    device: str = "gpu"  # "host": the stand-in of the tests, tiny sizes
    fa3: Path | None = None  # a library with FlashAttention-3's operators
    work: Path = WORK  # models and compiled stand-ins are kept there
    limit: float = LIMIT_SECONDS

    @property
    def tiny(self) -> bool:
        return self.device == "host"


@dataclass
class Job:
    """One part's run, inside its process."""

    options: Options
    lines: Callable[[str], None]  # takes results, one JSON text each
    began: float = field(default_factory=time.monotonic)
    _noted: set[str] = field(default_factory=set)

    @cached_property
    def bed(self) -> Bed:
        """The device; made when it is first needed."""
        from gpu.bed import GpuBed, HostBed

        if self.options.tiny:
            self.options.work.mkdir(parents=True, exist_ok=True)
            return HostBed(self.options.work)
        return GpuBed()

    def left(self) -> float:
        """Seconds until the part's limit."""
        return self.options.limit - (time.monotonic() - self.began)

    def say(self, text: str) -> None:
        """Progress, for people."""
        print(f"  {text}", file=sys.stderr, flush=True)

    def emit(self, table: str, labels: tuple[str, ...], **figures: Figure) -> None:
        self.lines(encode(Result(table, labels, figures)))
        shown = ", ".join(f"{name} {_short(value)}" for name, value in figures.items() if value is not None)
        self.say(f"{' · '.join(labels)}: {shown}")

    def note(self, text: str) -> None:
        """What a reader must know of this part's figures."""
        self.lines(json.dumps({"note": text}))
        self.say(text)

    def note_once(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self.note(text)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of work of under ten minutes."""

    name: str
    what: str
    run: Callable[[Job], None]
