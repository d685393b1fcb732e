"""What a person sees while a model is converted: a bar on a terminal, two lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class ConversionReport:
    """A context manager around one conversion; silent when not wanted."""

    def __init__(self, name: str, wanted: bool) -> None:
        self._name = name
        self._wanted = wanted
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        if self._wanted:
            print(f"pagehold: {self._name}: {text}", file=sys.stderr, flush=True)

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` tensors are written."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)

    def __enter__(self) -> Self:
        if self._wanted and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("[bold]converting {task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self._name, total=None)
            self._bar.start()
        else:
            self.say("converting, once")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self.say("converted")
