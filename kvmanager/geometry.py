"""The shape of a pool and its place: as an executor asks for it, as the tables have it, and what tells them apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from kvmanager.errors import Refusal, Refused
from kvmanager.layout import IN_WORDS, LAYER_MAJOR, PAGE_MAJOR, U64, Geometry, Header, KvDtype, PoolKind, Tables
from pagehold.kv.v1 import kv_manager_pb2 as kv

NO_DEVICE: Final = bytes(16)
_HOST_DTYPES: Final = (KvDtype.FLOAT32, KvDtype.BFLOAT16, KvDtype.INT8)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pool's memory is; fixed for the pool's life."""

    kind: PoolKind = PoolKind.HOST
    device: bytes = NO_DEVICE  # uuid


HOST: Final = Place()


def asked_geometry(request: kv.AttachRequest) -> Geometry:
    """What the executor asks for, with no pages yet. Raises Refused(INVALID)."""
    asked = request.geometry
    try:
        kv_dtype = KvDtype[asked.kv_dtype.upper()]
        fingerprint = bytes.fromhex(request.fingerprint)
    except (KeyError, ValueError):
        kv_dtype, fingerprint = KvDtype.FLOAT32, b""
    sizes = (asked.rows, asked.page_size, asked.layers, asked.kv_heads, asked.head_dim, asked.max_model_len)
    if len(fingerprint) != 32 or not all(sizes):
        raise Refused(
            Refusal.INVALID, "attach needs a fingerprint of 64 hex digits, a kv_dtype and all sizes of the geometry"
        )
    _check_pages(kv_dtype, asked.layout_id, PoolKind(request.device.kind))
    return Geometry(
        pages=0,
        rows=asked.rows,
        page_size=asked.page_size,
        layers=asked.layers,
        kv_heads=asked.kv_heads,
        head_dim=asked.head_dim,
        kv_dtype=kv_dtype,
        layout_id=asked.layout_id,
        max_model_len=asked.max_model_len,
    )


def _check_pages(kv_dtype: KvDtype, layout_id: int, kind: PoolKind) -> None:
    """Raises Refused(INVALID) for pages that no kernel of the device reads, and for layouts that nobody knows."""
    layouts = (PAGE_MAJOR, IN_WORDS) if kind is PoolKind.HOST else (PAGE_MAJOR, LAYER_MAJOR)
    if layout_id not in layouts:
        raise Refused(Refusal.INVALID, f"page layout {layout_id} is none of {layouts}, those of such a pool")
    if kind is PoolKind.HOST and kv_dtype not in _HOST_DTYPES:
        raise Refused(Refusal.INVALID, f"pages of {kv_dtype.name.lower()} are for GPUs only; choose another --kv-dtype")
    if kind is not PoolKind.HOST and kv_dtype is KvDtype.INT8:
        raise Refused(Refusal.INVALID, "pages of int8 are for CPUs only; choose another --kv-dtype")


def asked_place(request: kv.AttachRequest) -> Place:
    """Raises Refused(INVALID)."""
    kind = PoolKind(request.device.kind)
    if kind is PoolKind.HOST:
        return HOST
    if len(request.device.uuid) != len(NO_DEVICE) or request.device.uuid == NO_DEVICE or not request.device.pid:
        raise Refused(Refusal.INVALID, "attach to a pool on a device needs that device's uuid, and a pid")
    return Place(kind, request.device.uuid)


def asked_scales(request: kv.AttachRequest, geometry: Geometry) -> list[float]:
    """float32, [layers][K, V][kv_heads]; fp8 pages have them, others have none. Raises Refused(INVALID)."""
    scales = list(request.scales)
    if len(scales) != geometry.scales or not all(0 < scale < math.inf for scale in scales):
        message = f"pages of {geometry.kv_dtype.name.lower()} take {geometry.scales} positive scales"
        raise Refused(Refusal.INVALID, f"{message}, not {len(scales)} such as {scales[:1]}")
    return scales


def read_place(header: U64) -> Place:
    """header: u64 [64], of `tables`. Raises ValueError when it is none."""
    kind = PoolKind(int(header[Header.POOL_KIND]))
    device = header[Header.DEVICE_UUID : Header.DEVICE_UUID + 2].tobytes()
    if (kind is PoolKind.HOST) != (device == NO_DEVICE):
        raise ValueError("kind of pool")
    return Place(kind, device)


def read_shape(header: U64) -> tuple[int, int, int, int, int]:
    """The numbers that `Tables` takes: pages, rows, entries, page size, scales."""
    pages, rows, entries, page_size, layers, kv_heads = (
        int(header[word])
        for word in (
            Header.PAGES,
            Header.ROWS,
            Header.ROW_ENTRIES,
            Header.PAGE_SIZE,
            Header.LAYERS,
            Header.KV_HEADS,
        )
    )
    scales = layers * 2 * kv_heads if int(header[Header.KV_DTYPE]) == KvDtype.FP8_E4M3 else 0
    return pages, rows, entries, page_size, scales


def read_geometry(header: U64) -> Geometry:
    """header: u64 [64], of `tables`. Raises ValueError when it is no geometry."""
    return Geometry(
        pages=int(header[Header.PAGES]),
        rows=int(header[Header.ROWS]),
        page_size=int(header[Header.PAGE_SIZE]),
        layers=int(header[Header.LAYERS]),
        kv_heads=int(header[Header.KV_HEADS]),
        head_dim=int(header[Header.HEAD_DIM]),
        kv_dtype=KvDtype(int(header[Header.KV_DTYPE])),
        layout_id=int(header[Header.LAYOUT_ID]),
        max_model_len=int(header[Header.MAX_MODEL_LEN]),
    )


def read_fingerprint(header: U64) -> str:
    """Of the model's contents: 64 hex digits."""
    return header[Header.FINGERPRINT : Header.FINGERPRINT + 4].tobytes().hex()


def difference(
    there: Geometry,
    there_fingerprint: str,
    asked: Geometry,
    fingerprint: str,
    there_place: Place = HOST,
    asked_place: Place = HOST,
) -> str:
    """What keeps an executor from using the pool, in words; empty when nothing does.

    Shorter contexts and fewer rows than the tables have are fine.
    """
    differences = (
        ("kind of pool (--device, --pool)", there_place.kind != asked_place.kind),
        ("device", there_place.kind == asked_place.kind and there_place.device != asked_place.device),
        ("model", there_fingerprint != fingerprint.lower()),
        ("page size", there.page_size != asked.page_size),
        ("element type of the pages", there.kv_dtype != asked.kv_dtype),
        ("page layout", there.layout_id != asked.layout_id),
        (
            "page shape",
            (there.layers, there.kv_heads, there.head_dim) != (asked.layers, asked.kv_heads, asked.head_dim),
        ),
        ("context length", asked.max_model_len > there.max_model_len),
        ("number of rows", asked.rows > there.rows),
    )
    return ", ".join(name for name, differs in differences if differs)


def same_scales(tables: Tables, asked: list[float]) -> bool:
    """What is stored means nothing under other scales."""
    return bool(tables.scales.tolist() == asked)
