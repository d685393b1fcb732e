"""What the manager does with each call, without its transport: checks, the core, the files."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import structlog

from kvmanager import answers
from kvmanager import pool as pools
from kvmanager.asked import Asked
from kvmanager.core import ManagerCore
from kvmanager.device.memory import Exporter, load_driver
from kvmanager.device.owner import TakeOffer, allocate, have_memory
from kvmanager.errors import Refusal, Refused
from kvmanager.fsck import Report, check_manager
from kvmanager.layout import PoolKind
from kvmanager.pins import Pin, Pinned
from kvmanager.pool import REMEDY, CannotAdopt, Pool
from kvmanager.records import Records
from kvmanager.room import check_room
from kvmanager.source import Source
from kvmanager.stored import check_tables
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.lock import FileLock, LockBusy, read_id
from pagehold.runtime.protocol import skew
from pagehold.runtime.statedir import StateDir

log = structlog.get_logger()

_EXPIRY_SECONDS: Final = 1.0  # how often ended records are looked for
_MOST_OUTPUTS: Final = 1024  # of one request


def _real_exporter(kind: PoolKind) -> Exporter:
    return load_driver().exporter(kind)


class Manager:
    """The daemon's state: a pool, its core and the records, from the first attach on.

    Everything runs on one thread, a call at a time.
    """

    def __init__(
        self,
        state: StateDir,
        quota: int,
        ttl: float,
        hit: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        exporter: Callable[[PoolKind], Exporter] = _real_exporter,
    ) -> None:
        """Adopts what an earlier manager left. quota: bytes of records; ttl: seconds. Raises CannotAdopt."""
        self._state = state
        self._quota = quota
        self._ttl = ttl
        self._hit = hit
        self._clock = clock
        self._exporter = exporter
        self._next_expiry = 0.0
        self.incarnation = secrets.token_bytes(16)
        self.pool: Pool | None = None
        self.core: ManagerCore | None = None
        self.records: Records | None = None
        hit("kvmanager.adopt.before")
        pool = pools.adopt(state)
        if pool is not None:
            self._build(pool)

    def _build(self, pool: Pool) -> None:
        """Serves from this pool. Raises CannotAdopt when its tables contradict themselves."""
        records = Records(self._state.records, pool.fingerprint, self._quota, self._hit)
        if wrong := check_tables(pool.tables, records.source):
            raise CannotAdopt(f"{self._state.tables} is damaged: {wrong[0]}; see `pagehold fsck`, or {REMEDY}")
        self.pool, self.records = pool, records
        self.core = ManagerCore(pool.tables, records.source, hit=self._hit, back=pool.back)

    @property
    def epoch(self) -> int:
        return self.core.epoch if self.core is not None else 0

    def attach(self, request: kv.AttachRequest, take_offer: TakeOffer = lambda pool_uuid: None) -> kv.Reply:
        """The holder of executor.lock, and nobody else. Makes the pool when there is none.

        For a pool on a device every earlier executor is proved dead. take_offer(pool uuid): the descriptor of that
        pool's memory, if the executor still has it; the manager's from then on.
        """
        try:
            return kv.Reply(attach=self._attach(request, take_offer))
        except Refused as refused:
            return answers.error_reply(refused)

    def _attach(self, request: kv.AttachRequest, take_offer: TakeOffer) -> kv.AttachResponse:
        if len(request.executor_id) != 16 or request.executor_id != read_id(self._state.executor_lock):
            raise Refused(Refusal.STALE_EPOCH, "executor.lock names another executor")
        if wrong := skew("kvmanager", "executor", request.protocol):
            raise Refused(Refusal.PROTOCOL, wrong)
        asked = Asked.of(request)
        is_new = self.pool is None or not self._serves(self.pool, asked)
        if is_new:
            self._make_pool(asked, request.pool_bytes)
        assert self.pool is not None and self.core is not None and self.records is not None
        if asked.place.kind is not PoolKind.HOST:
            exporter = self._exporter(asked.place.kind)
            is_new = have_memory(self.pool, self.core, request.device.mapped_pool, take_offer, exporter) or is_new
        self.core.prefix_cache = request.prefix_cache
        self._hit("kvmanager.attach.before")
        epoch = self.core.attach(request.executor_id)
        self._hit("kvmanager.attach.after")
        return kv.AttachResponse(
            epoch=epoch,
            incarnation=self.incarnation,
            pool_is_new=is_new,
            pages=self.pool.geometry.pages,
            keys=sorted(self.records.unfinished_keys | {key for key, _ in self.core.live_rows}),
            export=answers.export(self.pool),
        )

    def _serves(self, pool: Pool, asked: Asked) -> bool:
        """Whether the pool there can be used. False: it may be replaced. Raises Refused(WRONG_MODEL)."""
        different = asked.difference(pool)
        if not different:
            return True
        assert self.core is not None and self.records is not None
        if not len(self.records) and not self.core.live_rows:
            log.info("pool made anew", different=different)
            return False
        raise Refused(
            Refusal.WRONG_MODEL,
            f"{self._state.root} holds {len(self.records)} requests of a pool with another {different}; start the "
            "executor with the same model and flags, or drop them with `pagehold up --discard`",
        )

    def _make_pool(self, asked: Asked, pool_bytes: int) -> None:
        geometry = pools.fitting(self._state, asked.geometry, pool_bytes, asked.place)
        if self.pool is not None:
            self.pool.close()  # before the next one: a device may not have room for both
        memory = None
        try:
            if asked.place.kind is not PoolKind.HOST:
                memory = allocate(self._exporter(asked.place.kind), asked.place, geometry.pages * geometry.page_bytes)
            self._build(pools.create(self._state, geometry, asked.fingerprint, asked.place, asked.scales))
        except OSError as error:
            self.pool = self.core = self.records = None  # the files of an older pool may be gone
            if memory is not None:
                memory.close()
            message = f"cannot make the page pool: {error.strerror}; choose a smaller --kv-memory"
            raise Refused(Refusal.NO_MEMORY, message) from error
        if memory is not None:
            assert self.pool is not None
            self.pool.hold(memory)

    def hand_over(self, executor_id: bytes, send: Callable[[bytes, bytes, int], None]) -> None:
        """Gives the attached executor what its answer cannot carry. send(executor id, pool uuid, descriptor)."""
        memory = self.pool.memory if self.pool is not None else None
        if self.pool is not None and memory is not None and memory.fd is not None:
            send(executor_id, self.pool.uuid, memory.fd)

    def call(self, call: kv.Call) -> kv.Reply:
        """One call of the attached executor."""
        assert self.core is not None and self.records is not None
        try:
            match call.WhichOneof("call"):
                case "ensure_rows":
                    return kv.Reply(ensure_rows=answers.ensure_rows(self.core, call.ensure_rows))
                case "ensure":
                    return kv.Reply(ensure=answers.ensure(self.core, call.ensure))
                case "fork":
                    return kv.Reply(fork=answers.fork(self.core, call.fork))
                case "open":
                    return kv.Reply(open=self._open(self.core, self.records, call.open.record))
                case "trim":
                    trim = call.trim
                    self.core.trim(trim.key, trim.index, trim.row_generation, trim.capacity)
                    return kv.Reply(trim=kv.TrimResponse())
                case "close":
                    close = call.close
                    self.core.close(close.key, close.index, close.row_generation)
                    return kv.Reply(close=kv.CloseResponse())
                case "forget":
                    self._forget(self.core, self.records, call.forget.key)
                    return kv.Reply(forget=kv.ForgetResponse())
                case _:
                    raise Refused(Refusal.INVALID, "a call of no known kind")
        except Refused as refused:
            return answers.error_reply(refused)

    def _open(self, core: ManagerCore, records: Records, record: kv.RequestRecord) -> kv.OpenResponse:
        found = records.find(record)
        if found is None:
            _check_record(core, records, record)
            key = records.write(record)
        else:
            key = found
        source = records.source(key)
        assert source is not None
        output = source.outputs[0]
        cached = core.cached_tokens(source.root, output.tokens[: output.prompt_length])
        return kv.OpenResponse(key=key, existed=found is not None, cached_tokens=cached)

    def _forget(self, core: ManagerCore, records: Records, key: str) -> None:
        if core.has_rows(key):
            raise Refused(Refusal.INVALID, f"{key} has live rows: close them first")
        if not records.ended(key):
            raise Refused(Refusal.INVALID, f"{key} has outputs that have not ended")
        records.forget(key)
        self._hit("kvmanager.forget.after")

    def sweep(self) -> int:
        """Between calls: seals what was filled, forgets what is long over. Returns how many pages were sealed."""
        if self.core is None or self.records is None:
            return 0
        sealed = self.core.seal_all()
        now = self._clock()
        if now >= self._next_expiry:
            self._next_expiry = now + _EXPIRY_SECONDS
            for key in self.records.expired(now, self._ttl):
                if not self.core.has_rows(key) or self._close_orphans(self.core, key):
                    self.records.forget(key)
            self.core.pages.regrow()
            self.records.unmap_ended({key for key, _ in self.core.live_rows})
        return sealed

    def _close_orphans(self, core: ManagerCore, key: str) -> bool:
        """Closes the rows of a record whose executor is proved dead; False while one may live."""
        lock = FileLock(self._state.executor_lock)
        try:
            lock.acquire()
        except LockBusy:
            return False
        try:
            core.close_all(key)
        finally:
            lock.release()
        return True

    def fsck(self) -> Report:
        """Looks at everything; changes nothing."""
        if self.core is None or self.records is None:
            return Report([])
        return check_manager(self._state, self.core, self.records)

    def pins(self) -> list[Pinned]:
        """The pinned prefixes, by name."""
        return self.core.pins.list() if self.core is not None else []

    def unpin(self, pin: Pin) -> bool:
        """Whether there was such a pin."""
        return self.core is not None and self.core.unpin(pin)

    def stats(self, attached: bool) -> kv.GetStatsResponse:
        if self.core is None or self.records is None:
            return kv.GetStatsResponse(incarnation=self.incarnation)
        pages = self.core.pages
        return kv.GetStatsResponse(
            pages=pages.usable,
            free_pages=pages.available,
            cached_pages=pages.cached,
            shared_pages=int(np.count_nonzero(pages.holders > 1)),
            rows=len(self.core.live_rows),
            records=len(self.records),
            epoch=self.epoch,
            incarnation=self.incarnation,
            executor_attached=attached,
            prefix_hit_tokens=self.core.hit_tokens,
            prefix_query_tokens=self.core.query_tokens,
            pinned_pages=len(self.core.pins.pages),
        )


def _check_record(core: ManagerCore, records: Records, record: kv.RequestRecord) -> None:
    """Raises Refused for what could never be served."""
    if not record.prompt or not record.max_tokens or not record.digest or not 0 < record.outputs <= _MOST_OUTPUTS:
        message = f"a record needs a digest, a prompt, max_tokens and 1 to {_MOST_OUTPUTS} outputs"
        raise Refused(Refusal.INVALID, message)
    # The last token is never fed, so it needs no place.
    tokens = len(record.prompt) + record.max_tokens - 1
    for limit, what in ((core.rows.capacity, "a row"), (core.pages.usable, "the page pool")):
        if tokens > limit * core.page_size:
            message = f"prompt and max_tokens need {tokens} tokens, {what} holds {limit * core.page_size}"
            raise Refused(Refusal.TOO_LARGE, message)
    root, pin = records.names(record)
    if pin is not None or records.pinning or core.pins.pages:
        prompt = np.fromiter(record.prompt, np.uint32, len(record.prompt))
        check_room(core, records.unfinished, Source([], root, pin), prompt, tokens)
