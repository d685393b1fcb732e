"""The engine: `step()` is ensure -> schedule -> run -> commit -> publish.

One thread owns everything here. Frontends and the manager reach it through the inbox;
calls to the manager go out in one message a turn and their replies come back as events, so
no manager turn is ever waited for while there is something to compute.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from kvmanager.layout import Reason
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime import failpoint
from pagehold.runtime.progress import Progress
from services.executor import publisher
from services.executor.frontends import Frontends
from services.executor.inbox import (
    Attached,
    Connected,
    Disconnected,
    FromFrontend,
    Inbox,
    Replied,
    Stop,
    Wake,
)
from services.executor.pages import Pages
from services.executor.requests import Requests
from services.executor.runner.base import Runner, StepResult
from services.executor.scheduler import Plan, Scheduler

log = structlog.get_logger()

# A step that takes longer is a hang. A chunk's share is generous: a loaded machine is no fault.
_STEP_SECONDS = 10.0
_SECONDS_PER_POSITION = 0.1
_IDLE_SECONDS = 0.1  # how often deadlines and detached requests are looked at


class Engine:
    """Runs steps until it is told to stop."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        requests: Requests,
        frontends: Frontends,
        pages: Pages,
        inbox: Inbox,
        send: Callable[[list[kv.Call]], None],
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """clock: CLOCK_MONOTONIC in seconds."""
        self.runner = runner
        self.scheduler = scheduler
        self.requests = requests
        self.frontends = frontends
        self.pages = pages
        self.inbox = inbox
        self.progress = progress
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self._send = send
        self._clock = clock
        self._connections: list[publisher.Connection] = []
        self._stopping = False

    def run(self) -> None:
        """Until `Stop`. Any exception is a fault of the process: the supervisor starts another."""
        busy = False
        while not self._stopping:
            for event in self.inbox.take(0 if busy else _IDLE_SECONDS):
                self._handle(event)
            busy = self.step()

    def step(self) -> bool:
        """One turn; whether there was anything to compute."""
        now = self._clock()
        self.requests.expire(now)
        # What ended gives its pages back before anybody asks for more, and all of it comes before the plan:
        # making room may take a row away.
        calls = self.requests.take_calls() + self.pages.ensure(now)
        if calls:
            failpoint.hit("executor.ensure.before")
            self._send(calls)
            failpoint.hit("executor.ensure.after")
        plan = self.scheduler.plan()
        if plan.chunks:
            self._commit(plan, self._run(plan))
        publisher.publish(self._connections)
        return bool(plan.chunks)

    def _run(self, plan: Plan) -> StepResult:
        self.progress.begin_turn(_STEP_SECONDS + _SECONDS_PER_POSITION * plan.positions)
        failpoint.hit("executor.run.before")
        result = self.runner.step(plan.chunks)
        failpoint.hit("executor.run.after")
        return result

    def _commit(self, plan: Plan, result: StepResult) -> None:
        """Token and log-probability first, then the progress word by one store."""
        committed = decoded = 0
        tokens, logprobs = result.tokens.tolist(), result.logprobs.tolist()
        for sequence, chunk, token, logprob in zip(plan.sequences, plan.chunks, tokens, logprobs, strict=True):
            output, known = sequence.log, sequence.known
            _, start, count, _, samples = chunk
            if samples:
                output.tokens[known] = token
                if output.logprobs is not None:
                    output.logprobs[known] = logprob
                known += 1
                committed += 1
                decoded += count == 1
            failpoint.hit("executor.commit.before")
            output.set_progress(start + count, known)
            failpoint.hit("executor.commit.after")
            sequence.computed, sequence.known = start + count, known
            if samples:
                length = known - sequence.prompt_length
                reason = sequence.request.rules.reason(token, length)
                if reason is not Reason.NONE:
                    self.requests.end(sequence, reason, length)
                publisher.mark(sequence)
        self.decode_tokens += decoded
        self.prefill_tokens += plan.positions - decoded
        self.progress.end_turn(committed)

    def _handle(self, event: object) -> None:
        match event:
            case FromFrontend(connection, message):
                self.frontends.handle(connection, message)
            case Replied(call, reply):
                self._replied(call, reply)
            case Connected(connection):
                self._connections.append(connection)
            case Disconnected(connection):
                connection.closed = True
                self._connections.remove(connection)
                self.frontends.disconnected(connection)
            case Attached(response):
                self.requests.adopt(response, self._clock())
            case Stop():
                self._stopping = True
            case Wake():
                pass

    def _replied(self, call: kv.Call, reply: kv.Reply) -> None:
        match call.WhichOneof("call"):
            case "ensure_rows":
                self.pages.grown(call.ensure_rows, reply)
            case "ensure":
                self.pages.ensured(call.ensure, reply)
            case "fork":
                self.pages.forked(call.fork, reply)
            case "open":
                self.frontends.opened(call.open, reply)
            case _:
                if reply.WhichOneof("reply") == "error":
                    log.error("manager refused a call", call=call.WhichOneof("call"), reason=reply.error.message)
                self.pages.freed()
