"""Keys: what a request's files, a row and a pinned prefix are called, as text and as words of `tables`."""

from __future__ import annotations

import hashlib

import numpy as np

from kvmanager.layout import PIN_NAME_WORDS, U64


def request_key(tenant: str, request_id: str) -> str:
    """The name of a request's files: 128 bits of SHA-256, in hex."""
    return hashlib.sha256(f"{tenant}\0{request_id}".encode()).digest()[:16].hex()


def pin_key(tenant: str, name: str) -> str:
    """The key of a pinned prefix's row: no request's key."""
    return hashlib.sha256(f"pin\0{tenant}\0{name}".encode()).digest()[:16].hex()


def pin_words(tenant: str, name: str) -> U64:
    """u64[PIN_NAME_WORDS]; names are cut, which only shows in lists."""
    raw = f"{tenant}\0{name}".encode()[: PIN_NAME_WORDS * 8]
    return np.frombuffer(raw.ljust(PIN_NAME_WORDS * 8, b"\0"), np.uint64)


def words_pin(words: U64) -> tuple[str, str]:
    """Tenant and name. words: u64[PIN_NAME_WORDS]."""
    tenant, _, name = words.tobytes().rstrip(b"\0").decode(errors="replace").partition("\0")
    return tenant, name


def key_words(key: str) -> tuple[int, int]:
    """The two words of `row_key` for a key in hex."""
    raw = bytes.fromhex(key)
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


def words_key(words: U64) -> str:
    """The key in hex for the two words of `row_key`."""
    return words.astype("<u8").tobytes().hex()
