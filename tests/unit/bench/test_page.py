from __future__ import annotations

from pathlib import Path

import pytest
from peers_lib import page
from peers_lib.report import dump

from tests.unit.bench.results import entrant, outcome, report

MINE, PEER = entrant("pagehold", "bfloat16"), entrant("vllm", "float32")


def test_the_page_has_what_the_files_say() -> None:
    text = (page.DOCS / "measurements.md").read_text()
    wanted = page.section(page.DOCS / page.FOLDER)
    assert page.replaced(text, wanted) == text, "run scripts/bench/peers --page"


def test_files_of_one_machine_are_one_part(tmp_path: Path) -> None:
    (tmp_path / "peers-xeon.a.json").write_text(dump(report([MINE], [outcome(1, MINE.name, 100)])))
    (tmp_path / "peers-xeon.b.json").write_text(dump(report([PEER], [outcome(1, PEER.name, 50)])))
    (tmp_path / "peers-zen.json").write_text(dump(report([MINE], [outcome(1, MINE.name, 30)])))
    (tmp_path / "peers-xeon.speed.png").write_bytes(b"")
    (tmp_path / "peers-zen.json.bak").write_text("")
    text = page.section(tmp_path)
    xeon, zen = text.partition("### xeon")[2].split("### zen")
    assert "100.0" in xeon and "50.0" in xeon and "2.00 × as fast †" in xeon
    assert f"![peers-xeon.speed.png]({tmp_path.name}/peers-xeon.speed.png)" in xeon
    assert "30.0" in zen and "png" not in zen


def test_a_file_that_is_no_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "peers-x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"peers-x\.json: not a report"):
        page.section(tmp_path)


def test_only_the_section_is_exchanged() -> None:
    new = "## Against other engines\n\nnew\n"
    document = "# M\n\n## Against other engines\n\nold\n\n### x\n\n## B\n\nb\n"
    assert page.replaced(document, new) == "# M\n\n## Against other engines\n\nnew\n\n## B\n\nb\n"
    assert page.replaced("# M\n", new) == f"# M\n\n{new}"
