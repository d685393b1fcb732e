"""An engine and a manager in one thread, over real shared files, with a scripted frontend."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvmanager.keys import request_key
from kvmanager.service import Manager
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.lock import FileLock
from pagehold.runtime.progress import Progress
from pagehold.runtime.statedir import StateDir
from pagehold.v1 import inference_pb2 as api
from services.executor.engine import Engine
from services.executor.frontends import Frontends
from services.executor.inbox import Attached, Connected, Disconnected, FromFrontend, Inbox, Replied
from services.executor.pages import Pages
from services.executor.publisher import Connection
from services.executor.requests import Requests
from services.executor.runner.base import DraftLimits
from services.executor.scheduler import Scheduler
from services.executor.sequence import Sequence
from services.executor.shared import SharedPool
from tests.unit.executor.checking_runner import CheckingRunner
from tests.unit.executor.flying_runner import FlyingRunner

PAGE_SIZE = 16
EOS = 7


@dataclass
class Stream:
    """What one stream was sent."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    ended: dict[int, ex.Ended] = field(default_factory=dict)
    accepted: int = 0
    recomputed: int = 0
    failures: list[int] = field(default_factory=list)
    records: list[ex.Record] = field(default_factory=list)


class Frontend(Connection):
    """Takes every message at once and sorts it by stream; offsets must be contiguous."""

    def __init__(self) -> None:
        super().__init__(asyncio.new_event_loop(), lambda: None)
        self._loop.close()
        self.heard: dict[int, Stream] = {}
        self.starts: dict[tuple[int, int], int] = {}
        self.reading = True

    @property
    def has_room(self) -> bool:
        return self.reading

    def offer(self, message: ex.ConnectResponse) -> None:
        for accepted in message.accepted:
            self.stream(accepted.stream_id).accepted += 1
        for record in message.records:
            self.stream(record.stream_id).records.append(record)
        for stream_id in message.recomputed:
            self.stream(stream_id).recomputed += 1
        run, taken = message.tokens, 0
        for stream_id, index, offset, count in zip(run.stream_ids, run.indexes, run.offsets, run.counts, strict=True):
            if stream_id in self.streams:
                log = self.streams[stream_id].sequences[index].log
                assert offset + count <= log.known - log.prompt_length, "published before it was committed"
            tokens = self.stream(stream_id).tokens.setdefault(index, [])
            start = self.starts.setdefault((stream_id, index), offset)
            assert offset == start + len(tokens), "a gap or a repetition"
            tokens.extend(run.token_ids[taken : taken + count])
            self.stream(stream_id).logprobs.setdefault(index, []).extend(run.logprobs[taken : taken + count])
            taken += count
        for ended in message.ended:
            self.stream(ended.stream_id).ended[ended.index] = ended
        for failed in message.failed:
            self.stream(failed.stream_id).failures.append(failed.failure)

    def stream(self, stream_id: int) -> Stream:
        return self.heard.setdefault(stream_id, Stream())


@dataclass
class Clock:
    """CLOCK_MONOTONIC, moved by hand."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """One state folder; `start_executor` again is what a kill and a restart leave."""

    def __init__(
        self,
        root: Path,
        pages: int = 200,
        clock: Callable[[], float] = time.monotonic,
        record_ttl: float = 600.0,
        depth: int = 0,
        drafts: DraftLimits | None = None,
        stream_interval: float = 0.0,
        **limits: int,
    ) -> None:
        """depth, drafts: the runner's."""
        self.depth = depth
        self.stream_interval = stream_interval
        self.drafts = drafts
        self.state = StateDir.prepare(root)
        self.clock = clock
        self.record_ttl = record_ttl
        self.pages = pages
        self.limits = {"max_num_seqs": 32, "max_batch_tokens": 64, "park_after": 256} | limits
        self.manager = self._new_manager()
        self.prefix_cache = True
        self.fork = True
        self.executors = 0
        self.lose_replies = False
        self.away = False  # the manager answers nothing; calls pile up
        self.unanswered: list[kv.Call] = []
        self.start_executor()

    def _new_manager(self) -> Manager:
        return Manager(self.state, quota=1 << 24, ttl=self.record_ttl, hit=lambda name: None, clock=self.clock)

    def restart_manager(self) -> None:
        """The old one's memory is gone; calls without an answer are repeated."""
        self.manager = self._new_manager()
        self._attach()

    def start_executor(self) -> None:
        self.executors += 1
        self._executor_id = self.executors.to_bytes(16, "little")
        self.away, self.unanswered = False, []
        lock = FileLock(self.state.executor_lock)
        lock.acquire()
        lock.write_id(self._executor_id)
        lock.release()
        self.inbox = Inbox()
        # The pages' contents outlive the executor, as the pool's memory does.
        slots = self.runner.slots if self.executors > 1 else {}
        self.runner: CheckingRunner = FlyingRunner() if self.depth else CheckingRunner(self.drafts)
        self.runner.slots = slots
        scheduler = Scheduler(PAGE_SIZE, **self.limits, drafts=self.drafts)
        self.pool = SharedPool(self.state)
        self.requests = Requests(scheduler, self.pool, self.runner, self.state.records, (EOS,), self.clock)
        self.frontends = Frontends(self.requests, self.pool, self.prefix_cache, self.clock)
        self.page_calls = Pages(scheduler, self.requests, self.runner, self.pool, self.prefix_cache, self.fork)
        self.engine = Engine(
            self.runner,
            scheduler,
            self.requests,
            self.frontends,
            self.page_calls,
            self.inbox,
            self._send,
            Progress(self.state.progress("executor")),
            self.clock,
            stream_interval=self.stream_interval,
        )
        self._attach()

    def _attach(self) -> None:
        geometry = kv.Geometry(
            layers=1,
            kv_heads=1,
            head_dim=32,
            page_size=PAGE_SIZE,
            kv_dtype="bfloat16",
            layout_id=1,
            max_model_len=1024,
            rows=2 * self.limits["max_num_seqs"],
        )
        page_bytes = 2 * 32 * PAGE_SIZE * 2
        reply = self.manager.attach(
            kv.AttachRequest(
                executor_id=self._executor_id,
                fingerprint="ab" * 32,
                geometry=geometry,
                pool_bytes=(self.pages + 1) * page_bytes,
                prefix_cache=self.prefix_cache,
            )
        )
        assert reply.WhichOneof("reply") == "attach", reply
        if not self.pool.mapped:
            self.runner.map_pool(self.pool.map(), self.pool.pages, self.pool.page_size)
        self.inbox.put(Attached(reply.attach))

    def answer(self, most: int = 1 << 30) -> None:
        """The manager answers the oldest of what has piled up, and is there again once that is all."""
        calls, self.unanswered = self.unanswered[:most], self.unanswered[most:]
        self.away = False
        self._send(calls)
        self.away = bool(self.unanswered)

    def _send(self, calls: list[kv.Call]) -> None:
        if self.away:
            self.unanswered += calls
            return
        for call in calls:
            reply = self.manager.call(call)
            if isinstance(self.runner, FlyingRunner):
                self.runner.check_pages(self.pool.tables)
            if self.lose_replies:
                reply = self.manager.call(call)  # the first answer was lost: the call is repeated
            self.inbox.put(Replied(call, reply))
        assert self.manager.core is not None
        assert self.manager.core.check_integrity() == []

    def connect(self) -> Frontend:
        frontend = Frontend()
        self.inbox.put(Connected(frontend))
        return frontend

    def disconnect(self, frontend: Frontend) -> None:
        self.inbox.put(Disconnected(frontend))

    def submit(
        self, frontend: Frontend, stream_id: int, prompt: list[int], tokens: int, name: str = "", **fields: object
    ) -> None:
        message = api.GenerateRequest(request_id=name or f"r{stream_id}", **fields)  # type: ignore[arg-type]
        message.sampling.seed = 0
        submit = ex.Submit(
            stream_id=stream_id,
            tenant="default",
            request=message.SerializeToString(),
            digest=b"d",
            prompt=prompt,
            max_tokens=tokens,
        )
        self.send(frontend, submit=submit)

    def send(self, frontend: Frontend, **message: object) -> None:
        self.inbox.put(FromFrontend(frontend, ex.ConnectRequest(**message)))  # type: ignore[arg-type]

    def sequence(self, name: str | int = 1, index: int = 0) -> Sequence:
        """Of the request of that name, or of stream number so and so."""
        key = request_key("default", name if isinstance(name, str) else f"r{name}")
        sequence = self.requests.sequence(key, index)
        assert sequence is not None
        return sequence

    def turn(self) -> bool:
        self.engine.handle(self.inbox.take(0))
        busy = self.engine.step()
        self.manager.sweep()
        return busy

    def run(self, turns: int = 2000) -> int:
        """Until nothing is left to do; how many turns it took."""
        idle = 0
        for turn in range(turns):
            idle = 0 if self.turn() or self.inbox._events else idle + 1
            if idle > 3:
                return turn
        raise AssertionError(f"still busy after {turns} turns")
