from __future__ import annotations

from gpu import tables
from gpu.catalogue import TABLES
from gpu.parts import PARTS
from gpu.questions import QUESTIONS
from gpu.report import Report

from tests.unit.gpucheck.findings import decode, report, result, run


def found(text: str, what: str) -> str:
    """The cell behind the aim of the question that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {what}"))
    return line.split("|")[3].strip()


def test_every_question_belongs_to_a_part_and_a_table() -> None:
    assert {question.part for question in QUESTIONS} <= {part.name for part in PARTS}
    assert {question.table for question in QUESTIONS} <= {table.name for table in TABLES}


def test_nothing_measured_is_said_of_every_question() -> None:
    text = tables.overview(Report())
    assert text.count(tables.NOT_MEASURED) == len(QUESTIONS)
    assert tables.details(Report()) == []


def test_a_result_that_lacks_the_figure_is_not_measured() -> None:
    text = tables.overview(report(run("engine", result("engine", "runner", "1", tokens_s=100.0))))
    assert found(text, "output tokens/s at 32 sequences, runner alone") == tables.NOT_MEASURED


def test_decode_is_counted_by_dtype_and_held_against_the_faster_peer() -> None:
    kept = report(
        run(
            "decode",
            decode("bfloat16", "page-major", 32, 2000, "met", flashinfer=1 / 1000, fa3=1 / 1600),
            decode("bfloat16", "layer-major", 32, 4000, "missed", flashinfer=1 / 5000, fa3=None),
            decode("fp8", "page-major", 32, 3000, "met"),
        )
    )
    text = tables.overview(kept)
    assert found(text, "decode attention, bfloat16") == "1 of 2 cases"
    assert found(text, "decode attention, fp8") == "1 of 1 cases"
    assert found(text, "decode attention against") == "0.80 to 1.25 times as fast; slower in 1 of 2 cases"
    assert found(text, "page-major against") == "0.50 to 0.50 times layer-major's rate"


def test_the_cost_of_determinism_is_a_ratio_of_one_run() -> None:
    kept = report(
        run(
            "engine",
            result("engine", "runner", "32", step=0.005),
            result("engine", "runner, deterministic", "32", step=0.0065),
        )
    )
    assert found(tables.overview(kept), "decode step at 32 with") == "1.30 times as long"


def test_a_table_shows_what_there_is() -> None:
    kept = report(run("decode", decode("fp8", "page-major", 64, 3000, "met", fa3=None), notes=("no FlashInfer",)))
    (table,) = tables.details(kept)
    head, _, row = table.splitlines()[2:]
    assert "FlashInfer" not in head and "FA3 us" in head
    assert [cell.strip() for cell in row.split("|")[1:6]] == ["fp8", "page-major", "4", "64", "8192"]
    assert "75.0%" in row and "–" in row
    assert "\n  - no FlashInfer" in tables.runs(kept)


def test_the_terminal_sees_why_a_part_ended_early() -> None:
    text = tables.render(report(run("append", reason="stopped at its limit of time")))
    assert "did not come to its end: stopped at its limit of time" in text
    assert found(text, "append attention") == tables.NOT_MEASURED


def test_pools_that_differ_are_told_apart() -> None:
    def asked(ipc: str, vmm: str) -> str:
        found_ = [result("processes", "last write", pool, answer=words) for pool, words in (("ipc", ipc), ("vmm", vmm))]
        return found(tables.overview(report(run("processes", *found_))), "a killed writer's last write")

    assert asked("none later", "none later") == "none later"
    assert asked("none later", "1 s later") == "ipc: none later; vmm: 1 s later"
