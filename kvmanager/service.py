"""Calls to the core and replies from it: what a session does, without its transport."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

import structlog

from kvmanager import pool as pools
from kvmanager.core import ManagerCore, Refusal, Refused
from kvmanager.layout import Geometry, KvDtype
from kvmanager.pool import CannotAdopt, NoMemory, Pool
from kvmanager.records import OtherBody, QuotaReached, Records
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.lock import read_id
from pagehold.runtime.statedir import StateDir

import numpy as np

log = structlog.get_logger()

_REASONS = {
    Refusal.NOT_FOUND: kv.ERROR_REASON_NOT_FOUND,
    Refusal.NO_PAGES: kv.ERROR_REASON_NO_PAGES,
    Refusal.NO_ROWS: kv.ERROR_REASON_NO_ROWS,
    Refusal.TOO_LARGE: kv.ERROR_REASON_TOO_LARGE,
}


class Manager:
    """The daemon's state: a pool, its core and the records, from the first attach on."""

    def __init__(self, state: StateDir, quota: int, ttl: float, hit: Callable[[str], None]) -> None:
        """Adopts what an earlier manager left. Raises CannotAdopt."""
        self._state = state
        self._quota = quota
        self._ttl = ttl
        self._hit = hit
        self.incarnation = secrets.token_bytes(16)
        self.pool: Pool | None = pools.adopt(state)
        self.core: ManagerCore | None = None
        self.records: Records | None = None
        if self.pool is not None:
            hit("kvmanager.adopt.before")
            self._build(self.pool)

    @property
    def epoch(self) -> int:
        return self.pool.epoch if self.pool is not None else 0

    def attach(self, request: kv.AttachRequest) -> kv.Reply:
        """The holder of executor.lock, and nobody else. Makes the pool when there is none."""
        if len(request.executor_id) != 16 or request.executor_id != read_id(self._state.executor_lock):
            return _error(kv.ERROR_REASON_STALE_EPOCH, "another executor holds executor.lock")
        try:
            is_new = self._match_pool(request)
        except (NoMemory, CannotAdopt) as error:
            reason = kv.ERROR_REASON_NO_MEMORY if isinstance(error, NoMemory) else kv.ERROR_REASON_WRONG_MODEL
            return _error(reason, str(error))
        except OSError as error:
            return _error(kv.ERROR_REASON_NO_MEMORY, f"cannot make the page pool: {error.strerror}")
        assert self.pool is not None and self.core is not None and self.records is not None
        self.core.prefix_cache = request.prefix_cache
        for key, index in list(self.core.live_rows):
            if self.records.source(key) is None:
                self.core.close(key, index, 0)
        self.pool.begin_epoch(request.executor_id)
        self._hit("kvmanager.attach.after")
        return kv.Reply(
            attach=kv.AttachResponse(
                epoch=self.pool.epoch,
                incarnation=self.incarnation,
                pool_is_new=is_new,
                pages=self.pool.geometry.pages,
                keys=self.records.keys,
            )
        )

    def _match_pool(self, request: kv.AttachRequest) -> bool:
        """Whether a new pool was made. Raises when the one there belongs to another model."""
        if self.pool is not None:
            there, wanted = self.pool.geometry, _geometry(request, self.pool.geometry.pages)
            if there == wanted and self.pool.fingerprint == request.fingerprint:
                return False
            if self.records is not None and len(self.records):
                what = "another model" if self.pool.fingerprint != request.fingerprint else "another page geometry"
                raise CannotAdopt(
                    f"the state folder {self._state.root} holds requests of {what}; start with the same model and "
                    "flags, or drop them with --discard"
                )
        geometry = _geometry(request, 0)
        pages = pools.pages_that_fit(self._state, geometry, request.pool_bytes)
        self.pool = pools.create(self._state, _geometry(request, pages), request.fingerprint)
        self._build(self.pool)
        return True

    def _build(self, pool: Pool) -> None:
        self.records = Records(self._state.records, pool.fingerprint, self._quota, self._hit)
        self.core = ManagerCore(pool.tables, self.records.source, hit=self._hit, back=pool.back)
        wrong = self.core.check_integrity()
        if wrong:
            raise CannotAdopt(f"{self._state.tables} is damaged: {wrong[0]}; start with --discard to drop it")

    def call(self, call: kv.Call) -> kv.Reply:
        """One call of the attached executor."""
        assert self.core is not None and self.records is not None
        try:
            match call.WhichOneof("call"):
                case "open":
                    return self._open(call.open)
                case "ensure":
                    ask = call.ensure
                    granted = self.core.ensure(
                        ask.key, ask.index, ask.row_generation, ask.capacity, ask.headroom, ask.keep_free
                    )
                    return kv.Reply(
                        ensure=kv.EnsureResponse(
                            row=granted.row,
                            row_generation=granted.generation,
                            capacity=granted.capacity,
                            cached_tokens=granted.cached,
                        )
                    )
                case "trim":
                    self.core.trim(call.trim.key, call.trim.index, call.trim.row_generation, call.trim.capacity)
                    return kv.Reply(trim=kv.TrimResponse())
                case "close":
                    self.core.close(call.close.key, call.close.index, call.close.row_generation)
                    return kv.Reply(close=kv.CloseResponse())
                case "forget":
                    if self.core.has_rows(call.forget.key):
                        return _error(kv.ERROR_REASON_INVALID, "the record has live rows: close them first")
                    self.records.forget(call.forget.key)
                    return kv.Reply(forget=kv.ForgetResponse())
                case _:
                    return _error(kv.ERROR_REASON_INVALID, "a call without a kind, or a second attach")
        except Refused as refusal:
            return _error(_REASONS[refusal.reason], str(refusal))

    def _open(self, request: kv.OpenRequest) -> kv.Reply:
        assert self.core is not None and self.records is not None
        record = request.record
        if not record.prompt or not record.outputs or not record.max_tokens:
            return _error(kv.ERROR_REASON_INVALID, "a record needs a prompt, outputs and max_tokens")
        try:
            key, existed = self.records.open(record)
        except OtherBody:
            return _error(kv.ERROR_REASON_ALREADY_EXISTS, "the id is in use with another body")
        except QuotaReached as error:
            return _error(kv.ERROR_REASON_QUOTA, str(error))
        except OSError as error:
            return _error(kv.ERROR_REASON_QUOTA, f"cannot write the record: {error.strerror}")
        source = self.records.source(key)
        assert source is not None
        cached = self.core.cached_tokens(source.root, np.array(record.prompt, np.uint32))
        return kv.Reply(open=kv.OpenResponse(key=key, existed=existed, cached_tokens=cached))

    def sweep(self) -> None:
        """Between calls: seals what was filled, forgets what is long over."""
        if self.core is None or self.records is None:
            return
        self.core.seal_all()
        for key in self.records.expired(time.monotonic(), self._ttl):
            if not self.core.has_rows(key):
                self.records.forget(key)

    def stats(self, attached: bool) -> kv.GetStatsResponse:
        if self.core is None or self.records is None:
            return kv.GetStatsResponse(incarnation=self.incarnation)
        pages = self.core.pages
        return kv.GetStatsResponse(
            pages=pages.count - 1,
            free_pages=pages.available,
            cached_pages=pages.available - len(pages.free),
            shared_pages=int(np.count_nonzero(pages.holders > 1)),
            rows=len(self.core.live_rows),
            records=len(self.records),
            epoch=self.epoch,
            incarnation=self.incarnation,
            executor_attached=attached,
            prefix_hit_tokens=self.core.hit_tokens,
            prefix_query_tokens=self.core.query_tokens,
        )


def _geometry(request: kv.AttachRequest, pages: int) -> Geometry:
    asked = request.geometry
    return Geometry(
        pages=pages,
        rows=asked.rows,
        page_size=asked.page_size,
        layers=asked.layers,
        kv_heads=asked.kv_heads,
        head_dim=asked.head_dim,
        kv_dtype=KvDtype[asked.kv_dtype.upper()],
        layout_id=asked.layout_id,
        max_model_len=asked.max_model_len,
    )


def _error(reason: kv.ErrorReason, message: str) -> kv.Reply:
    return kv.Reply(error=kv.Error(reason=reason, message=message))
