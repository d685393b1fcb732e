"""An executor without a model: it holds the lock, writes logs as the real one does, and asks at random.

Whatever the manager has not answered is kept, and said again to the next manager. A batch has one call
of each kind at most, and no two are about the same row, so what each did can be told apart.
"""

from __future__ import annotations

import queue
import random
import secrets
from dataclasses import dataclass
from enum import Enum
from typing import Final

import grpc

from kvmanager.layout import OutputLog, PageState, Reason, Tables, generation_of, request_key, state_of
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from pagehold.runtime.lock import FileLock
from pagehold.runtime.statedir import StateDir
from pagehold.v1 import inference_pb2 as api
from services.executor.sequence import map_log
from tests.faults.seen import Name

PAGE_SIZE: Final = 8
PAGES: Final = 48
FINGERPRINT: Final = "ab" * 32
TENANT: Final = "default"
_ROWS: Final = 12
_MOST_REQUESTS: Final = 6
_MOST_TOKENS: Final = 40  # of an output
_HEADROOM: Final = 2 * PAGE_SIZE
_SESSION_SECONDS: Final = 60.0  # a manager that says nothing is a failed test, not a hung one
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


class ManagerLost(Exception):
    """The session is over."""


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


class Session:
    """One stream to one manager."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._calls: queue.SimpleQueue[kv.SessionRequest | None] = queue.SimpleQueue()
        self.stub = kv_grpc.KvManagerServiceStub(channel)
        self._replies = self.stub.Session(iter(self._calls.get, None), timeout=_SESSION_SECONDS)

    def turn(self, calls: list[kv.Call]) -> list[kv.Reply]:
        """Raises ManagerLost."""
        self._calls.put(kv.SessionRequest(calls=calls))
        try:
            return list(next(self._replies).replies)
        except (StopIteration, grpc.RpcError) as error:
            raise ManagerLost from error

    def close(self) -> None:
        self._calls.put(None)
        self._channel.close()


class ScriptedExecutor:
    """`requests` and their rows are what the manager has answered; `unanswered` may have happened or not."""

    def __init__(self, state: StateDir, chance: random.Random) -> None:
        self._state = state
        self._chance = chance
        self._lock = FileLock(state.executor_lock)
        self._lock.acquire()
        self._session: Session | None = None
        self._opened = 0
        self.id = b""
        self.epoch = 0  # that the next attach must answer
        self.requests: dict[str, Request] = {}
        self.unanswered: list[kv.Call] = []
        self.become_another()

    def become_another(self) -> None:
        """As if the executor had died and its successor had the lock: the next attach starts an epoch."""
        self.id = secrets.token_bytes(16)
        self.epoch += 1
        self._lock.write_id(self.id)

    def close(self) -> None:
        self.hang_up()
        self._lock.release()

    def hang_up(self) -> None:
        if self._session is not None:
            self._session.close()
        self._session = None

    # --- turns ---

    def attach(self) -> kv.AttachResponse:
        """A new session. Raises ManagerLost."""
        self.hang_up()
        options = [("grpc.use_local_subchannel_pool", 1)]  # or this one would wait as the last one did
        channel = grpc.insecure_channel(f"unix:{self._state.kvmanager_socket}", options)
        self._session = Session(channel)
        geometry = kv.Geometry(
            layers=1,
            kv_heads=1,
            head_dim=32,
            page_size=PAGE_SIZE,
            kv_dtype="bfloat16",
            layout_id=1,
            max_model_len=256,
            rows=_ROWS,
        )
        request = kv.AttachRequest(
            executor_id=self.id,
            fingerprint=FINGERPRINT,
            geometry=geometry,
            pool_bytes=(PAGES + 1) * PAGE_SIZE * 2 * 32 * 2,
            prefix_cache=True,
        )
        (reply,) = self._session.turn([kv.Call(attach=request)])
        assert reply.HasField("attach"), reply
        return reply.attach

    def turn(self, tables: Tables) -> list[tuple[kv.Call, kv.Reply]]:
        """Says what is unanswered, or else something new. Raises ManagerLost, and then keeps it."""
        assert self._session is not None
        self.compute()
        if not self.unanswered:
            self.unanswered = self._batch()
        replies = self._session.turn(self.unanswered)
        answered = list(zip(self.unanswered, replies, strict=True))
        for call, reply in answered:
            self._take(call, reply, tables)
        self.unanswered = []
        return answered

    def fsck(self) -> list[kv.Finding]:
        """What the manager finds wrong: the files, and what it derives from them."""
        assert self._session is not None
        return list(self._session.stub.Fsck(kv.FsckRequest(), timeout=_SESSION_SECONDS).findings)

    # --- what the model would do ---

    def compute(self) -> None:
        """Every row goes on by some tokens, as far as its pages reach."""
        for output in self.outputs:
            log = output.log
            if output.row < 0 or log.ended:
                continue
            for _ in range(self._chance.randrange(3)):
                computed = min(log.known, output.capacity, log.computed + self._chance.randrange(1, 3 * PAGE_SIZE))
                known = log.known
                if computed == known and known < log.capacity:
                    log.tokens[known] = 1000 + (7 * known + 31 * output.name[1]) % 97  # equal outputs are found
                    known += 1
                log.set_progress(computed, known)

    @property
    def outputs(self) -> list[Output]:
        return [output for request in self.requests.values() for output in request.outputs]

    # --- calls ---

    def _batch(self) -> list[kv.Call]:
        kinds = [kind for kind in Operation if kind is not Operation.ATTACH]
        self._chance.shuffle(kinds)
        touched: set[Name] = set()
        calls = [self._make(kind, touched) for kind in kinds[: self._chance.randrange(1, 5)]]
        return [call for call in calls if call is not None]

    def _make(self, kind: Operation, touched: set[Name]) -> kv.Call | None:
        """A call of this kind about outputs that are not `touched`; None when there is nothing to ask."""
        free = [output for output in self.outputs if output.name not in touched]
        rows = [output for output in free if output.row >= 0]
        waiting = [output for output in free if output.row < 0 and not output.log.ended]
        match kind:
            case Operation.OPEN:
                return self._open() if len(self.requests) < _MOST_REQUESTS else None
            case Operation.FORGET:
                over = [request for request in self.requests.values() if request.over]
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
        preempted = [one for one in self.outputs if one.name in touched and one.row < 0 and not one.log.ended]
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

    # --- answers ---

    def _take(self, call: kv.Call, reply: kv.Reply, tables: Tables) -> None:
        if reply.HasField("error"):
            refusals = (kv.ERROR_REASON_NO_PAGES, kv.ERROR_REASON_NO_ROWS, kv.ERROR_REASON_QUOTA)
            assert reply.error.reason in (*refusals, kv.ERROR_REASON_TOO_LARGE), (call, reply)
            return
        match call.WhichOneof("call"):
            case "open":
                key = request_key(TENANT, call.open.record.request_id)
                logs = map_log(self._state.records / f"{key}.log").outputs
                self.requests[key] = Request(key, [Output((key, index), log) for index, log in enumerate(logs)])
            case "ensure":
                answer = reply.ensure
                self._granted((call.ensure.key, call.ensure.index), answer, answer.cached_tokens, tables)
            case "fork" if reply.fork.row_generation:
                self._granted((call.fork.key, call.fork.index), reply.fork, reply.fork.shared_tokens, tables)
            case "ensure_rows":
                by_row = {output.row: output for output in self.outputs if output.row >= 0}
                for row, capacity in zip(call.ensure_rows.rows, reply.ensure_rows.capacities, strict=True):
                    assert capacity, "a row that nobody closed is gone"
                    by_row[row].capacity = capacity
            case "forget":
                del self.requests[call.forget.key]

    def _granted(self, name: Name, answer: kv.EnsureResponse | kv.ForkResponse, shared: int, tables: Tables) -> None:
        output = self.requests[name[0]].outputs[name[1]]
        output.row, output.generation, output.capacity = answer.row, answer.row_generation, answer.capacity
        computed = shared
        if answer.HasField("copy"):
            word = tables.page_word[answer.copy.page]
            if generation_of(word) == answer.copy.page_generation and state_of(word) != PageState.FREE:
                computed += answer.copy.tokens
        output.log.set_progress(min(computed, output.log.known), output.log.known)
