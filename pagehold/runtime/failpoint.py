"""Named places where a fault can be put. Off unless armed; then `hit` costs one look-up.

    PAGEHOLD_FAILPOINTS="executor.commit.before=kill@3;kvmanager.ensure.after=delay:50"

`@3` lets the first two hits pass. Actions: kill (SIGKILL to itself), stop (SIGSTOP), delay:MS,
error (raises FailpointError). The environment arms every life of a process; `pagehold failpoint arm`
the one that runs.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

POINTS: Final = {
    "executor.lock.held": "a free executor.lock, and the id in it",
    "executor.attach.before": "a connection to the manager, and `attach`",
    "executor.attach.after": "the manager's answer to `attach`, and mapping the pool",
    "executor.map.after": "a mapped pool, and going on with the requests in it",
    "executor.adopt.before": "a record that was found, and its sequences",
    "executor.adopt.after": "all records adopted, and the first turn",
    "executor.submit.before": "a frontend's request, and the call that opens it",
    "executor.accept.before": "a written record, and its `accepted`",
    "executor.resume.before": "a frontend's `attach` to a request, and taking it up",
    "executor.resume.after": "a stream that was taken over, and its first message",
    "executor.detach.before": "a client that left, and the grace of its request",
    "executor.cancel.before": "a client's cancel, and the ends of its outputs",
    "executor.stop_at.before": "a stop string that a frontend found, and the end of the output",
    "executor.ensure.before": "the calls of a turn, and their sending",
    "executor.ensure.after": "the sending of a turn's calls, and the plan",
    "executor.grant.before": "a row that was granted, and its sequence's taking it",
    "executor.copy.before": "a granted row, and its copied slots",
    "executor.copy.after": "copied slots, and the progress word that counts them",
    "executor.preempt.before": "a choice of whose row goes, and `computed` = 0",
    "executor.preempt.after": "`computed` = 0, and the `close` of the row",
    "executor.run.before": "a plan, and its K/V in pages",
    "executor.run.after": "K/V in pages and sampled tokens, and the token slots",
    "executor.token.after": "a token's slot, and its log-probability's",
    "executor.commit.before": "a sequence's slots, and its progress word",
    "executor.commit.after": "a sequence's progress word, and the next sequence",
    "executor.finish.before": "a last token, and the terminal word",
    "executor.finish.after": "the terminal word, and the `close` of the row",
    "executor.publish.before": "a message to a frontend, and its sending",
    "executor.publish.after": "the sending of a message to a frontend, and the next turn",
    "frontend.submit.before": "a request that was checked, and its submission",
    "frontend.resume.before": "a `Resume` that was checked, and its `attach`",
    "frontend.introduce.before": "a new executor, and each stream told to it",
    "frontend.received.before": "a message of the executor, and its streams",
    "frontend.received.after": "tokens in their streams, and the next message",
    "frontend.stop_at.before": "a stop string that was found, and telling the executor",
    "frontend.cancel.before": "a client's cancel, and telling the executor",
    "frontend.detach.before": "a client that left, and telling the executor",
    "frontend.write.before": "text that is ready, and its message to the client",
    "frontend.write.after": "a message to the client, and the next one",
    "kvmanager.adopt.before": "a restart, and adopting the shared files",
    "kvmanager.rebuild.before": "adopted files, and what is derived from them",
    "kvmanager.rebuild.after": "derived counts, lists and index, and serving",
    "kvmanager.attach.before": "an executor that may attach, and its epoch",
    "kvmanager.attach.after": "a new epoch, and its answer",
    "kvmanager.open.log_written": "a log, and its record",
    "kvmanager.open.before_rename": "a record that is written, and the rename that commits it",
    "kvmanager.open.after": "a record, and the answer",
    "kvmanager.ensure.before": "a call for a row, and making it",
    "kvmanager.ensure.after": "a row, and the answer",
    "kvmanager.fork.before": "a call for a row from a sibling's, and making it",
    "kvmanager.fork.after": "a row from a sibling's, and the answer",
    "kvmanager.ensure_rows.before": "a call for more pages, and growing rows",
    "kvmanager.ensure_rows.after": "grown rows, and the answer",
    "kvmanager.page_taken": "the words of pages that are handed out, and their row entries",
    "kvmanager.row.before_word": "key, entries and length of a new row, and its word",
    "kvmanager.row.before_length": "new entries of a row, and its length that counts them",
    "kvmanager.row.released": "the word of a row that is given back, and its pages",
    "kvmanager.store.before": "any two stores of shared words",
    "kvmanager.seal.before_word": "hash, parent and tokens of a page, and its word",
    "kvmanager.seal.after": "a sealed page's word, and the prefix index",
    "kvmanager.pin.before": "a prompt whose row closes, and the row that pins it",
    "kvmanager.trim.after": "pages given back, and the answer",
    "kvmanager.close.before": "a call to give a row back, and doing it",
    "kvmanager.close.after": "a row given back, and the answer",
    "kvmanager.forget.after": "a dropped record, and the answer",
}


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
_counting = threading.Lock()  # a point may be passed by several threads


def arm(specification: str) -> None:
    """Replaces what is armed. Raises FailpointSyntaxError, and changes nothing then."""
    global _armed
    # One store: whoever passes meanwhile sees the old ones or the new ones.
    _armed = dict(_parse(part) for part in filter(None, map(str.strip, specification.split(";"))))


def arm_once(path: Path) -> None:
    """Adds what a file says that is meant for this life alone, and removes the file. Raises FailpointSyntaxError."""
    try:
        specification = path.read_text()
        path.unlink()
    except FileNotFoundError:
        return
    armed = _armed
    arm(specification)
    _armed.update({name: one for name, one in armed.items() if name not in _armed})


def _parse(part: str) -> tuple[str, _Armed]:
    name, separator, rest = part.partition("=")
    action_text, _, count = rest.partition("@")
    action_name, _, argument = action_text.partition(":")
    try:
        if not separator:
            raise ValueError
        armed = _Armed(Action(action_name), float(argument or 0), int(count or 1) - 1)
    except ValueError:
        wanted = "NAME=kill|stop|delay:MS|error with an optional @COUNT"
        raise FailpointSyntaxError(f"failpoint {part!r}: want {wanted}") from None
    if name not in POINTS:
        raise FailpointSyntaxError(f"no failpoint {name!r}; `pagehold failpoint list` names them")
    return name, armed


def hit(name: str) -> None:
    """A place between two steps. Does nothing unless `name` is armed."""
    if not _armed:
        return
    armed = _armed.get(name)
    if armed is None:
        return
    with _counting:
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
            raise FailpointError(f"failpoint {name}: armed with error")
