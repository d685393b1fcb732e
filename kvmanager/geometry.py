"""The shape of a pool: as an executor asks for it, as the tables have it, and what tells the two apart."""

from __future__ import annotations

from kvmanager.errors import Refusal, Refused
from kvmanager.layout import U64, Geometry, Header, KvDtype
from pagehold.kv.v1 import kv_manager_pb2 as kv


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


def difference(there: Geometry, there_fingerprint: str, asked: Geometry, fingerprint: str) -> str:
    """What keeps an executor from using the pool, in words; empty when nothing does.

    Shorter contexts and fewer rows than the tables have are fine.
    """
    differences = (
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
