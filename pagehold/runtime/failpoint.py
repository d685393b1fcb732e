"""Named places where a fault can be put. Off unless armed; then `hit` costs one look-up.

    PAGEHOLD_FAILPOINTS="executor.commit.before=kill@3;kvmanager.ensure.after=delay:50"

`@3` lets the first two hits pass. Actions: kill (SIGKILL to itself), stop (SIGSTOP), delay:MS,
error (raises FailpointError). docs/guarantees.md lists the names.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from enum import Enum


class FailpointError(Exception):
    """Raised by a failpoint armed with `error`."""


class FailpointSyntaxError(ValueError):
    """What is to be armed cannot be read; the message names the part."""


class Action(Enum):
    KILL = "kill"
    STOP = "stop"
    DELAY = "delay"
    ERROR = "error"


@dataclass(slots=True)
class _Armed:
    action: Action
    milliseconds: float
    passes: int  # hits that are still let through


_armed: dict[str, _Armed] = {}


def arm(specification: str) -> None:
    """Replaces what is armed. Raises FailpointSyntaxError."""
    armed: dict[str, _Armed] = {}
    for part in filter(None, (part.strip() for part in specification.split(";"))):
        name, separator, rest = part.partition("=")
        action_text, _, count = rest.partition("@")
        action_name, _, argument = action_text.partition(":")
        try:
            if not separator:
                raise ValueError
            armed[name] = _Armed(Action(action_name), float(argument or 0), int(count or 1) - 1)
        except ValueError:
            wanted = "NAME=kill|stop|delay:MS|error with an optional @COUNT"
            raise FailpointSyntaxError(f"failpoint {part!r}: want {wanted}") from None
    _armed.clear()
    _armed.update(armed)


def hit(name: str) -> None:
    """A place between two steps. Does nothing unless `name` is armed."""
    if not _armed:
        return
    armed = _armed.get(name)
    if armed is None:
        return
    if armed.passes > 0:
        armed.passes -= 1
        return
    match armed.action:
        case Action.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case Action.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case Action.DELAY:
            time.sleep(armed.milliseconds / 1000)
        case Action.ERROR:
            raise FailpointError(name)
