from __future__ import annotations

from pathlib import Path

import pytest
from peers_lib import job as jobs
from peers_lib.job import Job, Load, Notice, Stage
from peers_lib.worker import EngineError, in_one_line

LOADS = (Load("one", "/r", "/t"), Load("two", "/r2", "/t2"))
JOB = Job("bfloat16", ("weights=int8",), "/m", 1024, 8, LOADS, "/w", "/s", "/d", 1.5, 30.0)


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    jobs.write(tmp_path / "job", JOB)
    assert jobs.read(tmp_path / "job") == JOB


@pytest.mark.parametrize(
    "notice",
    [Notice(Stage.ROOT, pid=4), Notice(Stage.READY, seconds=1.5, version="1"), Notice(Stage.FAILED, reason="a\nb")],
)
def test_a_notice_is_one_line(notice: Notice) -> None:
    line = notice.to_line()
    assert line.count(b"\n") == 1
    assert Notice.from_line(line) == notice


def test_reasons_have_one_line() -> None:
    assert in_one_line(EngineError("no such thing\nand more")) == "no such thing"
    assert in_one_line(RuntimeError("\n  what went wrong\nTraceback …")) == "RuntimeError: what went wrong"
    assert in_one_line(MemoryError()) == "MemoryError"
