"""The comparison from its command line, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from peers_lib.report import load
from peers_lib.scenario import QUICK

PEERS = str(Path(__file__).resolve().parents[3] / "scripts" / "bench" / "peers")


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("pagehold-peers-*")}


def test_bad_words_are_answered_in_one_line() -> None:
    for words in (["--scenarios", "nine"], ["--engines", "llama"], ["--model", "no.gguf"], ["--render", "no.json"]):
        done = subprocess.run([PEERS, *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert done.stderr.startswith("peers: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.stack
def test_a_quick_comparison(tmp_path: Path) -> None:
    kept = tmp_path / "results" / "quick.json"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    in_memory = leftovers(Path("/dev/shm"))
    command = [
        PEERS,
        "--quick",
        "--engines",
        "pagehold",
        "--json",
        str(kept),
        "--timeout",
        "120",
        "--kv-memory",
        "256MiB",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    report = load(kept.read_text())
    assert [(outcome.scenario, outcome.reason) for outcome in report.outcomes] == [(one.name, "") for one in QUICK]
    for outcome, scenario in zip(report.outcomes, QUICK, strict=True):
        assert outcome.figures is not None
        assert outcome.figures.tokens == scenario.max_tokens * scenario.requests
        assert 0 < outcome.figures.first_p50 <= outcome.figures.seconds
        assert outcome.peak_bytes > 64 << 20
        assert outcome.agreement == 1.0
    assert json.loads(kept.read_text())["machine"]["read_gb_per_s"] > 0
    again = subprocess.run([PEERS, "--render", str(kept)], capture_output=True, text=True, timeout=60)
    assert again.stdout == done.stdout
    assert not leftovers(tmp_path)
    assert leftovers(Path("/dev/shm")) <= in_memory


@pytest.mark.stack
def test_a_variant_that_pagehold_refuses_has_its_words_in_the_row(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    words = ["--scenarios", "quick-one", "--engines", "pagehold:no-such-flag=1", "--kv-memory", "64MiB"]
    done = subprocess.run([PEERS, "--quick", *words], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert (
        "no figure: ended with exit code 2: pagehold up: error: unrecognized arguments: --no-such-flag=1" in done.stdout
    )


@pytest.mark.stack
def test_a_stopped_comparison_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    before = leftovers(Path("/dev/shm"))
    command = [PEERS, "--quick", "--engines", "pagehold", "--kv-memory", "256MiB"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (started := leftovers(Path("/dev/shm")) - before):
            time.sleep(0.05)
        # The engine's own processes are on their way by now.
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 128 + signal.SIGTERM
    assert started
    assert not leftovers(Path("/dev/shm")) & started
    assert not leftovers(tmp_path)
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and mentions(int(pid), started)]


def mentions(pid: int, names: set[str]) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return False
    return any(name in words for name in names)
