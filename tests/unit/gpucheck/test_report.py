from __future__ import annotations

import math

import pytest
from gpu.report import decode, dump, encode, load

from tests.unit.gpucheck.findings import report, result, run


def test_a_report_comes_back_from_its_file() -> None:
    kept = report(
        run("copy", result("rates", "device copy", gb_s=3000.0), notes=("quiet",)),
        run("decode", result("decode", "bfloat16", "page-major", gb_s=None, aim="met"), reason="stopped"),
    )
    assert load(dump(kept)) == kept


def test_numbers_that_are_none_become_null() -> None:
    kept = load(dump(report(run("copy", result("rates", "x", gb_s=math.nan)))))
    assert kept.results("rates")[0].figures == {"gb_s": None}
    assert decode(encode(result("rates", "x", gb_s=math.inf))).figures == {"gb_s": None}


def test_a_new_run_replaces_the_parts_former_one_only() -> None:
    first = report(run("copy", result("rates", "old")), run("gemm", result("gemm", "kept")))
    found = first.with_run(run("copy", result("rates", "new")))
    assert [one.labels for one in found.results("rates")] == [("new",)]
    assert [one.labels for one in found.results("gemm")] == [("kept",)]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "runs": []}', '{"format": 1, "runs": [{}]}'])
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a report"):
        load(text)
