from __future__ import annotations

from pathlib import Path

import pytest
from gpu import cli, run
from gpu.job import Job, Options, Part, PartError
from gpu.parts import PARTS
from gpu.report import Machine, PartRun, load

from tests.unit.gpucheck.findings import MACHINE, result


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts that were run, of which none does anything."""
    names: list[str] = []

    def pretend(part: Part, options: Options, command: str, machine: Machine) -> PartRun:
        names.append(part.name)
        reason = "it broke" if part.name == "append" else ""
        return PartRun(part.name, command, "now", machine, 1.0, reason, [result("rates", part.name, gb_s=1.0)])

    monkeypatch.setattr(cli, "run", pretend)
    monkeypatch.setattr(cli.machine, "examine", lambda repository: MACHINE)
    return names


def test_the_list_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [part.name for part in PARTS]


def test_flags_reach_the_process_of_a_part() -> None:
    wanted = cli.parser().parse_args(["copy", "--fa3", "/a/fa3.so"])
    options = Options(wanted.device, wanted.fa3, wanted.work, wanted.limit)
    assert options == Options(fa3=Path("/a/fa3.so"))
    again = cli.parser().parse_args(["copy", "--child", "7", *run.flags(options)])
    assert Options(again.device, again.fa3, again.work, again.limit) == options and again.child == 7


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str], ran: list[str]) -> None:
    assert cli.main(["decode", "decoed"]) == 2
    assert "no such part: decoed" in capsys.readouterr().err and not ran


def test_without_a_gpu_nothing_runs(
    capsys: pytest.CaptureFixture[str], ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.machine, "examine", lambda repository: Machine(cli.machine.NO_GPU, "", 0, "", 1, "", {}))
    assert cli.main(["copy"]) == 2
    assert "no GPU here" in capsys.readouterr().err and not ran


def test_a_file_keeps_the_parts_of_earlier_runs(
    capsys: pytest.CaptureFixture[str], ran: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "deep" / "gpu.json"
    assert cli.main(["copy", "--json", str(file)]) == 0
    assert cli.main(["append", "gemm", "--json", str(file)]) == 1, "append broke off"
    assert ran == ["copy", "append", "gemm"]
    kept = load(file.read_text())
    assert [run.command for run in kept.runs.values()] == [
        f"scripts/gpu-check copy --json {file}",
        *[f"scripts/gpu-check append gemm --json {file}"] * 2,
    ]
    assert "did not come to its end: it broke" in capsys.readouterr().out


def test_a_foreign_file_is_not_overwritten(capsys: pytest.CaptureFixture[str], ran: list[str], tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text("{}")
    assert cli.main(["copy", "--json", str(file)]) == 2
    assert file.read_text() == "{}" and not ran and "not a report" in capsys.readouterr().err


def test_a_part_that_fails_says_why() -> None:
    nobody = Part("nobody", "a part that is not there", lambda job: None)
    found = run.run(nobody, Options(device="host"), "", MACHINE)
    assert found.reason == "exit status 2: gpu-check: no such part: nobody; --list shows them"


def test_a_part_is_stopped_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_GRACE_SECONDS", 0.0)
    found = run.run(Part("copy", "", lambda job: None), Options(device="host", limit=0.05), "", MACHINE)
    assert found.reason == "stopped at its limit of time" and found.seconds < 5


def test_what_is_missing_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(job: Job) -> None:
        raise PartError("compute-sanitizer is not installed")

    def bare(job: Job) -> None:
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401

    assert cli.child(Part("x", "", broken), Options(), print) == 3
    assert cli.child(Part("x", "", bare), Options(), print) == 3
    assert capsys.readouterr().err.splitlines() == [
        "gpu-check: compute-sanitizer is not installed",
        "gpu-check: no_such_module is not installed: pip install '.[cuda13]'",
    ]
