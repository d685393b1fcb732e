"""The engine: `step()` is ensure -> schedule -> run -> commit -> publish.

One thread owns everything here. Frontends and the manager reach it through the inbox;
calls to the manager go out in one message a turn and their replies come back as events, so
no manager turn is ever waited for while there is something to compute.

On a device that runs by itself (`Runner.depth` 1) the engine is one step ahead:

    turn        | ensure, plan b, submit b | collect a, commit a, publish | ensure, plan c, submit c | collect b ...
    device   ... a ....................... | b .................................................... | c ...

What is planned counts a as done; what is committed does not (`sequence`). Pages that a turn takes away may be
written by the step that is under way: those calls, and all behind them, are sent when it is collected.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np
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
    Event,
    FromFrontend,
    Inbox,
    PoolLost,
    Replied,
    Stop,
    Wake,
)
from services.executor.pace import Pace
from services.executor.pages import Pages
from services.executor.requests import Requests
from services.executor.runner.base import Runner, StepResult
from services.executor.scheduler import Plan, Scheduler

log = structlog.get_logger()

_MAP_SECONDS: Final = 10.0  # a pool on a device is opened
_IDLE_SECONDS = 0.1  # how often deadlines and detached requests are looked at

_TAKE_PAGES: Final = ("close", "trim")  # from rows that a step may be writing


class Flight(NamedTuple):
    """A step that was submitted and is not collected."""

    plan: Plan
    ticket: object  # the runner's


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
        hang_seconds: float = 10.0,
        stream_interval: float = 0.0,
    ) -> None:
        """clock: CLOCK_MONOTONIC in seconds. hang_seconds: beyond what a turn should take.

        stream_interval: least seconds between two messages to a frontend, but for those that cannot wait.
        """
        self.runner = runner
        self.scheduler = scheduler
        self.requests = requests
        self.frontends = frontends
        self.pages = pages
        self.inbox = inbox
        self.progress = progress
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.draft_tokens = 0  # tried
        self.accepted_tokens = 0  # of them, that were right
        self.steps = 0
        self.step_sequences = 0  # of all steps together
        self.step_seconds = 0.0
        self._send = send
        self._clock = clock
        self._hang_seconds = hang_seconds
        self._stream_interval = stream_interval
        self._pace = Pace()
        self._began = 0.0
        self._connections: list[publisher.Connection] = []
        self._flight: Flight | None = None
        self._stopping = False

    def run(self) -> None:
        """Until `Stop`. Any exception is a fault of the process: the supervisor starts another."""
        busy = False
        while not self._stopping:
            self.progress.begin_turn(self._hang_seconds)
            self.handle(self.inbox.take(0 if busy else _IDLE_SECONDS))
            busy = self.step()
        if self._flight is not None:
            self._land()
        self._publish_all()
        self.progress.end_turn()

    def handle(self, events: list[Event]) -> None:
        """What came between two steps."""
        for event in events:
            self._handle(event)
        # Whoever came back has what is there at once, not only after another step.
        self._publish()

    def step(self) -> bool:
        """One turn; whether there was anything to compute."""
        now = self._clock()
        self.requests.expire(now)
        # What ended gives its pages back before anybody asks for more, and all of it comes before the plan:
        # making room may take a row away.
        late = self._call(self.requests.take_calls() + self.pages.ensure(now))
        plan = self.scheduler.plan()
        landing, self._flight = self._flight, None
        if not plan.chunks and landing is None:
            self._publish_all()
            return False
        positions = plan.positions
        if positions > len(plan.chunks):
            self._publish_all()  # a prompt makes the step a long one
        self._begin(positions + plan.drafts + (landing.plan.positions if landing is not None else 0))
        if plan.chunks:
            flight = self._submit(plan)
            if self.runner.depth:
                self._flight = flight
            else:
                landing = flight
        if landing is not None:
            self._commit(landing.plan, self._collect(landing))
        if late:
            self._send_all(late)
        self._publish()
        return True

    def _publish(self) -> None:
        publisher.publish(self._connections, self._clock(), self._stream_interval)

    def _publish_all(self) -> None:
        """What waits too: no step comes soon that would send it."""
        publisher.publish(self._connections, self._clock(), 0.0)

    def _call(self, calls: list[kv.Call]) -> list[kv.Call]:
        """Sends what may go now, in order; returns what waits for the step under way."""
        late: list[kv.Call] = []
        if self._flight is not None:
            for number, call in enumerate(calls):
                if call.WhichOneof("call") in _TAKE_PAGES:
                    calls, late = calls[:number], calls[number:]
                    break
        if calls:
            self._send_all(calls)
        return late

    def _send_all(self, calls: list[kv.Call]) -> None:
        failpoint.hit("executor.ensure.before")
        self._send(calls)
        failpoint.hit("executor.ensure.after")

    def _begin(self, positions: int) -> None:
        self._began = self._clock()
        self.progress.begin_turn(self._hang_seconds + self._pace.seconds(positions))

    def _submit(self, plan: Plan) -> Flight:
        failpoint.hit("executor.run.before")
        ticket = self.runner.submit(plan.chunks)
        for sequence, (_, start, count, _, samples, _) in zip(plan.sequences, plan.chunks, strict=True):
            sequence.computed = start + count
            if samples:
                sequence.known = start + count + 1
        return Flight(plan, ticket)

    def _collect(self, flight: Flight) -> StepResult:
        result = self.runner.collect(flight.ticket)
        failpoint.hit("executor.run.after")
        return result

    def _land(self) -> None:
        """Collects and commits the step under way, if there is one."""
        landing, self._flight = self._flight, None
        if landing is not None:
            self._begin(landing.plan.positions)
            self._commit(landing.plan, self._collect(landing))

    def _commit(self, plan: Plan, result: StepResult) -> None:
        """Tokens and log-probabilities first, then the progress word by one store."""
        committed = decodes = decoded = dropped = 0
        tokens, logprobs, drafts = result.tokens.tolist(), result.logprobs.tolist(), result.drafts
        tries = [0] * len(tokens) if drafts is None else drafts.tried.tolist()
        accepted = iter(()) if drafts is None else self._accept(plan, result)
        for sequence, chunk, token, logprob, tried in zip(
            plan.sequences, plan.chunks, tokens, logprobs, tries, strict=True
        ):
            _, start, count, _, samples, _ = chunk
            if sequence.row < 0:
                assert not tried, "a runner that drafts is of depth 0"
                dropped += count  # it ended, or lost its row, while the step was under way
                continue
            output, known, computed, right = sequence.log, sequence.committed, start + count, 0
            if samples:
                if tried:
                    right, token, logprob = next(accepted)
                    computed += right
                output.tokens[computed] = token
                failpoint.hit("executor.token.after")
                if output.logprobs is not None:
                    output.logprobs[computed] = logprob
                known = computed + 1
                committed += 1 + right
                if count == 1:
                    decodes, decoded = decodes + 1, decoded + 1 + right
            failpoint.hit("executor.commit.before")
            output.set_progress(computed, known)
            failpoint.hit("executor.commit.after")
            sequence.settled, sequence.committed = computed, known
            if right:
                sequence.computed, sequence.known = computed, known
            if samples:
                length = known - sequence.prompt_length
                reason = sequence.request.rules.reason(token, length)
                if reason is not Reason.NONE:
                    self.requests.end(sequence, reason, length)
                publisher.mark(sequence)
        self.decode_tokens += decoded
        self.prefill_tokens += plan.positions - decodes - dropped
        seconds = self._clock() - self._began
        self.steps += 1
        self.step_sequences += len(plan.chunks)
        self.step_seconds += seconds
        self._pace.learn(plan.positions + plan.drafts, seconds)
        self.progress.end_turn(committed, self._hang_seconds)

    def _accept(self, plan: Plan, result: StepResult) -> Iterator[tuple[int, int, float]]:
        """For each chunk that tried drafts: how many of them are kept, and what comes after: token, log-probability.

        The kept ones are in the log, where the runner put them; here their log-probabilities follow.
        """
        assert result.drafts is not None and self.scheduler.drafts is not None
        first = 0  # of the chunk's log-probabilities
        for number in np.flatnonzero(result.drafts.tried).tolist():
            sequence, chunk = plan.sequences[number], plan.chunks[number]
            tried, right = int(result.drafts.tried[number]), int(result.drafts.right[number])
            token, logprob = int(result.tokens[number]), float(result.logprobs[number])
            output, start = sequence.log, chunk.start + chunk.count
            logprobs = result.drafts.logprobs[first : first + right]
            first += tried
            self.draft_tokens += tried
            self.accepted_tokens += right
            sequence.drafting.learn(start + right + 1, tried, right, self.scheduler.drafts.each)
            # One that ends the output is its last token, whatever was right behind it.
            for kept, draft in enumerate(output.tokens[start : start + right].tolist()):
                if sequence.request.rules.reason(draft, start + kept + 1 - sequence.prompt_length) is not Reason.NONE:
                    right, token, logprob = kept, draft, float(logprobs[kept])
                    break
            if output.logprobs is not None:
                output.logprobs[start : start + right] = logprobs[:right]
            yield right, token, logprob

    def _handle(self, event: Event) -> None:
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
            case Attached(response, open_pool):
                self.progress.begin_turn(self._hang_seconds + _MAP_SECONDS)
                open_pool()
                failpoint.hit("executor.map.after")
                # There may be tens of thousands of records: each is a sign of life.
                self.requests.adopt(response, self._clock(), lambda: self.progress.begin_turn(self._hang_seconds))
            case PoolLost(let_go):
                self._land()
                self.pages.lose_all()
                let_go()
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
