from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import measurements
import pytest
from gpu.machine import NO_GPU
from gpu.report import dump

from tests.unit.gpucheck.findings import MACHINE, report, result, run


def test_the_page_has_what_the_files_say() -> None:
    text = (measurements.DOCS / "measurements.md").read_text()
    wanted = measurements.section(measurements.collect(measurements.DOCS / "measurements"))
    assert measurements.replaced(text, wanted) == text, "run scripts/bench/measurements.py"


def test_each_machine_has_its_part() -> None:
    one = report(run("copy", result("rates", "device copy", gb_s=3000.0)))
    text = measurements.section({"h100": one, "h200": one})
    assert text.index("### h100") < text.index("### h200")
    assert "3000 GB/s" in text and "`scripts/gpu-check copy`, 2026-01-02T03:04:05+00:00, commit 0123456789ab" in text


def test_only_the_section_is_exchanged() -> None:
    page = "# M\n\n## A\n\na\n\n## On a GPU\n\nold\n\n### x\n\n## B\n\nb\n"
    assert (
        measurements.replaced(page, "## On a GPU\n\nnew\n") == "# M\n\n## A\n\na\n\n## On a GPU\n\nnew\n\n## B\n\nb\n"
    )
    assert measurements.replaced("# M\n", "## On a GPU\n\nnew\n") == "# M\n\n## On a GPU\n\nnew\n"


def test_figures_without_a_gpu_never_get_onto_the_page(tmp_path: Path) -> None:
    one = replace(run("copy", result("rates", "device copy", gb_s=1.0)), machine=replace(MACHINE, gpu=NO_GPU))
    (tmp_path / "gpu-x.json").write_text(dump(report(one)))
    with pytest.raises(ValueError, match=r"gpu-x\.json was made without a GPU"):
        measurements.collect(tmp_path)
