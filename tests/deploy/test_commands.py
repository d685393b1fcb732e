"""The check of command lines finds what Pagehold would refuse, or never look at."""

from __future__ import annotations

import pytest

from pagehold.runtime.settings import RunExecutorSettings
from tests.deploy.commands import read_component, read_shared


def test_flags_and_environment_are_read_as_they_will_be() -> None:
    words = "run executor --kv-memory 2GiB --standby".split()
    found = read_component(words, {"PAGEHOLD_THREADS": "3", "PATH": "/bin"})
    assert isinstance(found, RunExecutorSettings)
    assert (found.kv_memory, found.standby, found.threads) == (2 << 30, True, 3)


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        ("run executor --kv-memory much", {}),
        ("run executor --listen 127.0.0.1:1", {}),
        ("run kvmanager", {"PAGEHOLD_RECORD_TTL": "soon"}),
    ],
)
def test_what_pagehold_refuses_is_refused(words: str, environment: dict[str, str]) -> None:
    with pytest.raises(SystemExit):
        read_component(words.split(), environment)


def test_a_variable_that_nobody_reads_is_found() -> None:
    with pytest.raises(AssertionError, match="PAGEHOLD_KV_MEMORY"):
        read_component(["run", "frontend"], {"PAGEHOLD_KV_MEMORY": "1GiB"})
    read_shared(["run", "frontend"], {"PAGEHOLD_KV_MEMORY": "1GiB"})
