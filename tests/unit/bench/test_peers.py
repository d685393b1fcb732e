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
    repeated = ["--together", "--engines", "pagehold:prefix-cache"]
    for words in (
        repeated,
        ["--scenarios", "nine"],
        ["--engines", "llama"],
        ["--model", "no.gguf"],
        ["--render", "no.json"],
    ):
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
def test_engines_that_take_turns(tmp_path: Path) -> None:
    """All are up at once; a later round is computed again, not answered from what an engine kept."""
    kept = tmp_path / "results.json"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    engines = "pagehold:speculation=off,pagehold:no-such-flag=1,pagehold:weights=int8+speculation=off"
    words = ["--quick", "--together", "--rounds", "2", "--engines", engines, "--kv-memory", "256MiB"]
    command = [PEERS, *words, "--json", str(kept), "--timeout", "120"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    report = load(kept.read_text())
    first, wrong, second = (entrant.name for entrant in report.entrants)
    rows = {(outcome.entrant, outcome.round, outcome.scenario): outcome for outcome in report.outcomes}
    assert set(rows) == {(name, number, one.name) for name in (first, second) for number in (1, 2) for one in QUICK}
    for (name, _, scenario), outcome in rows.items():
        assert outcome.figures is not None, outcome.reason
        wanted = next(one for one in QUICK if one.name == scenario)
        assert outcome.figures.tokens == wanted.max_tokens * wanted.requests
        # Tokens that were kept come at once, all with the first message.
        assert outcome.figures.between_p50 > 1e-4
        assert outcome.agreement is not None and (name != first or outcome.agreement == 1.0)
    lines = [line.split(": ")[1].strip() for line in done.stderr.splitlines() if line.startswith("peers:   pagehold")]
    assert lines == [name for order in ((first, second), (second, first)) for _ in QUICK for name in order]
    assert "unrecognized arguments: --no-such-flag=1" in done.stdout and wrong in done.stdout
    assert not leftovers(tmp_path)


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
