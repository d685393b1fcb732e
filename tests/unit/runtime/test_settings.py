"""Sizes as people write them, and where settings come from."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pagehold.runtime.settings import ExecutorSettings, KvManagerSettings, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65536),
        ("4GiB", 4 << 30),
        ("4 gib", 4 << 30),
        ("512M", 512 << 20),
        ("512MiB", 512 << 20),
        ("1.5k", 1536),
        ("2T", 2 << 40),
        (" 7 ", 7),
        ("3B", 3),
        (12, 12),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "4 Gi B", "-1", "1e9", "four", "4XiB", "4GiB extra"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="want a size such as"):
        parse_bytes(text)


def test_a_setting_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEHOLD_RECORD_QUOTA", "3MiB")
    assert KvManagerSettings().record_quota == 3 << 20
    assert KvManagerSettings(record_quota="1k").record_quota == 1024


@pytest.mark.parametrize("wrong", [{"page_size": 4}, {"kv_memory": "0"}, {"memory_fraction": 1.5}, {"device": "tpu"}])
def test_values_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ExecutorSettings(**wrong)
