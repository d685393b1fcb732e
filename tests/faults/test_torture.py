"""`pagehold torture` in its short form: the whole command, from its flags to its results."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import COMMAND

pytestmark = pytest.mark.stack

SECONDS = 240.0


def torture(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, "torture", *flags], capture_output=True, text=True, timeout=SECONDS)


def test_a_short_run_is_clean_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    before = set(Path("/dev/shm").glob("pagehold-torture-*"))

    done = torture("--kills=5", "--streams=4", "--seed=11", "--only=::kill", "--record-ttl=5", f"--results={path}")

    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads(path.read_text())["runs"]
    assert run["seed"] == 11
    assert len(run["trials"]) >= 5
    assert run["streams_checked"] >= 4
    assert run["checks"] == 2, "before the first fault and after the last one"
    assert [run[name] for name in ("wrong", "lost", "repeated", "errors", "leaks")] == [0] * 5
    assert set(Path("/dev/shm").glob("pagehold-torture-*")) == before


def test_an_unknown_fault_is_wrong_usage() -> None:
    done = torture("--only=executor:executor.nowhere")
    assert done.returncode == 2
    assert "no fault of that name" in done.stderr
