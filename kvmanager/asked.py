"""The pool that an executor asks for, checked before anything is made for it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kvmanager.device.refusals import Identity, refused_mps, refused_pids
from kvmanager.errors import Refusal, Refused
from kvmanager.geometry import Place, asked_geometry, asked_place, asked_scales, difference, same_scales
from kvmanager.layout import Geometry, PoolKind
from kvmanager.pool import Pool
from pagehold.kv.v1 import kv_manager_pb2 as kv


@dataclass(frozen=True, slots=True)
class Asked:
    """Sound, but it may not be the pool that is there."""

    geometry: Geometry  # with no pages yet
    place: Place
    fingerprint: str
    scales: list[float]

    @classmethod
    def of(cls, request: kv.AttachRequest) -> Asked:
        """Raises Refused(INVALID)."""
        geometry, place = asked_geometry(request), asked_place(request)
        scales = asked_scales(request, geometry)
        if place.kind is not PoolKind.HOST:
            executor = Identity(request.device.pid, request.device.pid_namespace)
            refused = refused_pids(place.kind, Identity.own(), executor) or refused_mps(os.environ)
            if refused:
                raise Refused(Refusal.INVALID, refused)
        return cls(geometry, place, request.fingerprint, scales)

    def difference(self, pool: Pool) -> str:
        """What keeps the executor from using this pool, in words; empty when nothing does."""
        there = (pool.geometry, pool.fingerprint, self.geometry, self.fingerprint)
        different = difference(*there, pool.place, self.place)
        return different or ("" if same_scales(pool.tables, self.scales) else "set of fp8 scales")
