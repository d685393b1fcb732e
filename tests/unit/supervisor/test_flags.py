"""What a supervisor was told reaches its children as flags."""

from __future__ import annotations

import pytest

from pagehold.runtime.settings import ExecutorSettings, FrontendSettings, KvManagerSettings, UpSettings
from services.cli.main import _read
from services.supervisor.flags import flags_of
from services.supervisor.fleet import COMPONENTS


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PAGEHOLD_CONFIG", "PAGEHOLD_THREADS"):
        monkeypatch.delenv(name, raising=False)


def test_flags_go_where_they_belong_and_read_back_the_same() -> None:
    words = "--state-dir /dev/shm/x --listen 0.0.0.0:7 --kv-memory 2GiB --no-prefix-cache --record-ttl 5".split()
    up = _read(UpSettings, words, "up")
    assert flags_of(up, FrontendSettings) == ["--state-dir", "/dev/shm/x", "--listen", "0.0.0.0:7"]
    assert flags_of(up, KvManagerSettings) == ["--state-dir", "/dev/shm/x", "--record-ttl", "5.0"]
    executor = _read(ExecutorSettings, flags_of(up, ExecutorSettings), "executor")
    assert executor.kv_memory == 2 << 30
    assert executor.prefix_cache is False


def test_what_only_the_supervisor_does_is_not_handed_on() -> None:
    up = _read(UpSettings, ["--metrics-listen", "127.0.0.1:9"], "up")
    assert up.metrics_listen == "127.0.0.1:9"
    for kind in COMPONENTS.values():
        assert flags_of(up, kind) == []


def test_a_restarted_component_does_not_discard_again() -> None:
    up = _read(UpSettings, ["--discard"], "up")
    assert up.discard
    assert flags_of(up, KvManagerSettings) == []


def test_flag_beats_environment_beats_file(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pagehold.toml"  # type: ignore[operator]
    file.write_text('threads = 3\npage_size = 32\nlisten = "127.0.0.1:9"\n')
    monkeypatch.setenv("PAGEHOLD_CONFIG", str(file))
    monkeypatch.setenv("PAGEHOLD_THREADS", "4")
    up = _read(UpSettings, ["--listen", "127.0.0.1:8"], "up")
    assert (up.threads, up.page_size, up.listen) == (4, 32, "127.0.0.1:8")
    assert flags_of(up, ExecutorSettings) == ["--page-size", "32", "--threads", "4"]
