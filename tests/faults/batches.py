"""What the scripted executor asks next, at random.

A batch has one call of each kind at most, and no two are about the same row, so what each did can be
told apart.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum
from typing import Final

from kvmanager.layout import OutputLog, Reason
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.v1 import inference_pb2 as api
from tests.faults.seen import Name

PAGE_SIZE: Final = 8
TENANT: Final = "default"
_MOST_REQUESTS: Final = 6
_MOST_TOKENS: Final = 40  # of an output
_HEADROOM: Final = 2 * PAGE_SIZE
_PREFIXES: Final = tuple([100 * (kind + 1) + place for place in range(64)] for kind in range(4))


class Operation(Enum):
    """The manager's calls; a failpoint of this name lies between each and its answer."""

    ATTACH = "attach"
    OPEN = "open"
    ENSURE = "ensure"
    FORK = "fork"
    ENSURE_ROWS = "ensure_rows"
    TRIM = "trim"
    CLOSE = "close"
    FORGET = "forget"


@dataclass(slots=True, eq=False)
class Output:
    name: Name
    log: OutputLog
    row: int = -1
    generation: int = 0
    capacity: int = 0  # tokens


@dataclass(slots=True, eq=False)
class Request:
    key: str
    outputs: list[Output]

    @property
    def over(self) -> bool:
        return all(output.log.ended and output.row < 0 for output in self.outputs)


class Batches:
    """Makes calls about the requests that are there, and about new ones."""

    def __init__(self, requests: dict[str, Request], chance: random.Random) -> None:
        """requests: by key; somebody else adds and removes them as calls are answered."""
        self._requests = requests
        self._chance = chance
        self._opened = 0

    def next(self) -> list[kv.Call]:
        kinds = [kind for kind in Operation if kind is not Operation.ATTACH]
        self._chance.shuffle(kinds)
        touched: set[Name] = set()
        calls = [self._make(kind, touched) for kind in kinds[: self._chance.randrange(1, 5)]]
        return [call for call in calls if call is not None]

    @property
    def _outputs(self) -> list[Output]:
        return [output for request in self._requests.values() for output in request.outputs]

    def _make(self, kind: Operation, touched: set[Name]) -> kv.Call | None:
        """A call of this kind about outputs that are not `touched`; None when there is nothing to ask."""
        free = [output for output in self._outputs if output.name not in touched]
        rows = [output for output in free if output.row >= 0]
        waiting = [output for output in free if output.row < 0 and not output.log.ended]
        match kind:
            case Operation.OPEN:
                return self._open() if len(self._requests) < _MOST_REQUESTS else None
            case Operation.FORGET:
                over = [request for request in self._requests.values() if request.over]
                return kv.Call(forget=kv.ForgetRequest(key=self._chance.choice(over).key)) if over else None
            case Operation.ENSURE_ROWS:
                return self._ensure_rows(rows, touched) if rows else None
            case Operation.FORK:
                pairs = [(one, other) for one in waiting for other in rows if self._shared(one, other)]
                if not pairs:
                    return None
                output, sibling = self._chance.choice(pairs)
                touched.update((output.name, sibling.name))
                return self._fork(output, sibling)
            case Operation.ENSURE:
                return self._ensure(waiting, touched)
        if not rows:
            return None
        output = self._chance.choice(rows)
        touched.add(output.name)
        return self._trim(output) if kind is Operation.TRIM else self._close(output)

    def _open(self) -> kv.Call:
        self._opened += 1
        name, prefix = f"request-{self._opened}", self._chance.choice(_PREFIXES)
        prompt = prefix[: self._chance.randrange(1, 64)]
        message = api.GenerateRequest(request_id=name)
        if len(prompt) >= PAGE_SIZE and not self._chance.randrange(8):
            message.pin_prefix = f"pin-{self._chance.randrange(3)}"
        record = kv.RequestRecord(
            tenant=TENANT,
            request_id=name,
            request=message.SerializeToString(),
            prompt=prompt,
            digest=name.encode(),
            outputs=self._chance.choice((1, 1, 2, 4)),
            max_tokens=self._chance.randrange(1, _MOST_TOKENS),
        )
        return kv.Call(open=kv.OpenRequest(record=record))

    def _ensure(self, waiting: list[Output], touched: set[Name]) -> kv.Call | None:
        """Of an output without a row; rather of one whose row this very batch gives back.

        When the batch is repeated its `close` must not take the new row.
        """
        preempted = [one for one in self._outputs if one.name in touched and one.row < 0 and not one.log.ended]
        if not waiting and not preempted:
            return None
        output = self._chance.choice(preempted or waiting)
        touched.add(output.name)
        wants = {"capacity": output.log.known, "headroom": _HEADROOM, "keep_free": self._chance.randrange(4)}
        return kv.Call(ensure=kv.EnsureRequest(key=output.name[0], index=output.name[1], **wants))

    def _shared(self, output: Output, sibling: Output) -> int:
        """Tokens that the output could share with the sibling's row."""
        ours, theirs = output.log, sibling.log
        if output.name[0] != sibling.name[0] or ours.computed or theirs.ended:
            return 0
        return min(theirs.computed, ours.prompt_length)

    def _fork(self, output: Output, sibling: Output) -> kv.Call:
        return kv.Call(
            fork=kv.ForkRequest(
                key=output.name[0],
                index=output.name[1],
                from_index=sibling.name[1],
                from_row_generation=sibling.generation,
                length=self._shared(output, sibling),
                capacity=output.log.known,
                headroom=_HEADROOM,
            )
        )

    def _ensure_rows(self, rows: list[Output], touched: set[Name]) -> kv.Call:
        touched.update(output.name for output in rows)
        return kv.Call(
            ensure_rows=kv.EnsureRowsRequest(
                rows=[output.row for output in rows],
                row_generations=[output.generation for output in rows],
                capacities=[min(output.log.known + PAGE_SIZE, output.log.capacity) for output in rows],
                headrooms=[_HEADROOM] * len(rows),
            )
        )

    def _trim(self, output: Output) -> kv.Call:
        kept = max(output.log.computed, 1)
        output.capacity = min(output.capacity, -(-kept // PAGE_SIZE) * PAGE_SIZE)  # nothing is written beyond
        return kv.Call(
            trim=kv.TrimRequest(
                key=output.name[0], index=output.name[1], row_generation=output.generation, capacity=kept
            )
        )

    def _close(self, output: Output) -> kv.Call:
        """The end of the output, or its preemption: then nothing is computed any more, and that is said first."""
        log, generation = output.log, output.generation
        if log.known < log.capacity and self._chance.randrange(2):
            log.set_progress(0, log.known)
        else:
            log.set_terminal(Reason.LENGTH, log.known - log.prompt_length)
        output.row, output.generation, output.capacity = -1, 0, 0
        return kv.Call(close=kv.CloseRequest(key=output.name[0], index=output.name[1], row_generation=generation))
