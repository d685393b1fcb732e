"""An executor without a model: it holds the lock, writes logs as the real one does, and asks at random.

Whatever the manager has not answered is kept, and said again to the next manager.
"""

from __future__ import annotations

import queue
import random
import secrets
from typing import Final

import grpc

from kvmanager.keys import request_key
from kvmanager.layout import PageState, Tables, generation_of, state_of
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from pagehold.runtime.lock import FileLock
from pagehold.runtime.statedir import StateDir
from services.executor.sequence import map_log
from tests.faults.batches import PAGE_SIZE, TENANT, Batches, Output, Request
from tests.faults.seen import Name

_PAGES: Final = 48
_ROWS: Final = 12
_SESSION_SECONDS: Final = 60.0  # a manager that says nothing is a failed test, not a hung one


class ManagerLost(Exception):
    """The session is over."""


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
        self.id = b""
        self.epoch = 0  # that the next attach must answer
        self.requests: dict[str, Request] = {}
        self._batches = Batches(self.requests, chance)
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
            fingerprint="ab" * 32,
            geometry=geometry,
            pool_bytes=(_PAGES + 1) * PAGE_SIZE * 2 * 32 * 2,
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
            self.unanswered = self._batches.next()
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
