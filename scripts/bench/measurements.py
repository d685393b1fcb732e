"""Writes the section "On a GPU" of docs/measurements.md from the files that scripts/gpu-check --json made.

Usage: scripts/bench/measurements.py [--check]   (reads docs/measurements/gpu-*.json, one file a machine)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent))

from gpu import tables
from gpu.machine import NO_GPU
from gpu.report import Report, load

DOCS: Final = Path(__file__).resolve().parents[2] / "docs"
HEADING: Final = "## On a GPU"

_PREFACE: Final = """\
Made by `scripts/bench/measurements.py` from files of `scripts/gpu-check --json docs/measurements/gpu-NAME.json`. Times
are medians over replays of CUDA graphs, over rotating K/V larger than the L2 cache; bytes are K and V that the launch
needs; all sides of a ratio come from one run. Wanted of decode attention: from 1 GB a launch on 90 % of the copy rate
(fp8: 85 %), below that 95 % of a plain read of the same pages. The bound of a decode step is weights without the
embedding, and K/V, over the copy rate."""


def section(reports: dict[str, Report]) -> str:
    """reports: by the file's name. One overview a machine, or one of questions that nobody has answered."""
    blocks = [HEADING, _PREFACE]
    for name, report in reports.items() or {"": Report()}.items():
        if name:
            blocks += [f"### {name}", tables.runs(report)]
        blocks += [tables.overview(report), *tables.details(report)]
    return "\n\n".join(blocks) + "\n"


def replaced(document: str, text: str) -> str:
    """The document with its section, which ends where the next of the same level begins, exchanged or added."""
    found = re.search(rf"^{HEADING}$.*?(?=^## |\Z)", document, re.MULTILINE | re.DOTALL)
    if not found:
        return f"{document.rstrip()}\n\n{text}"
    rest = document[found.end() :]
    return f"{document[: found.start()]}{text}{chr(10) if rest else ''}{rest}"


def collect(folder: Path) -> dict[str, Report]:
    """Raises ValueError for a file that is none of gpu-check's, or was made on the tests' stand-in."""
    found = {path.stem.removeprefix("gpu-"): load(path.read_text()) for path in sorted(folder.glob("gpu-*.json"))}
    for name, report in found.items():
        if any(run.machine.gpu == NO_GPU for run in report.runs.values()):
            raise ValueError(f"gpu-{name}.json was made without a GPU")
    return found


def main() -> int:
    page = DOCS / "measurements.md"
    document = page.read_text()
    wanted = replaced(document, section(collect(DOCS / "measurements")))
    if "--check" in sys.argv[1:]:
        return int(wanted != document)
    page.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
