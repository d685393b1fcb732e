"""The section "Against other engines" of docs/measurements.md, from the files docs/measurements/peers-*.json.

Files of one machine are one part, whatever runs they are of; pictures of `plots.py` stand at its end.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from peers_lib.contestant import REPOSITORY
from peers_lib.report import Report, load
from peers_lib.table import render

DOCS: Final = REPOSITORY / "docs"
FOLDER: Final = "measurements"  # in DOCS
HEADING: Final = "## Against other engines"
_PREFACE: Final = """\
Made by `scripts/bench/peers --page` from files of `scripts/bench/peers --json`, of which `scripts/bench/comparison
MACHINE` makes all. All engines have the same weights, rounded once to bfloat16 (llama.cpp: to the type of its file),
and the same request files. vLLM and transformers run inside one process, without a server; Pagehold's tokens go through
three processes and real gRPC streams, llama.cpp's through its HTTP server."""


def collect(folder: Path) -> dict[str, list[Report]]:
    """Reports by the name of their machine: what the files' names begin with up to a dot. Raises ValueError.

    `peers-NAME.json` or `peers-NAME.PART.json`.
    """
    found: dict[str, list[Report]] = {}
    for path in sorted(folder.glob("peers-*.json")):
        name = path.stem.removeprefix("peers-").partition(".")[0]
        try:
            found.setdefault(name, []).append(load(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
    return found


def pictures(folder: Path, name: str) -> list[str]:
    """Names of the machine's pictures."""
    return sorted(path.name for path in folder.glob(f"peers-{name}.*.png"))


def section(folder: Path) -> str:
    """Raises ValueError for files that do not belong together."""
    blocks = [HEADING, _PREFACE]
    for name, reports in collect(folder).items():
        shown = [f"![{picture}]({folder.name}/{picture})" for picture in pictures(folder, name)]
        blocks += [f"### {name}", render(reports).rstrip(), *shown]
    return "\n\n".join(blocks) + "\n"


def replaced(document: str, text: str) -> str:
    """The document with its section, which ends where the next of the same level begins, exchanged or added."""
    found = re.search(rf"^{HEADING}$.*?(?=^## |\Z)", document, re.MULTILINE | re.DOTALL)
    if not found:
        return f"{document.rstrip()}\n\n{text}"
    rest = document[found.end() :]
    return f"{document[: found.start()]}{text}{chr(10) if rest else ''}{rest}"


def write(docs: Path = DOCS) -> Path:
    """The page, written anew. Raises ValueError, OSError."""
    page = docs / "measurements.md"
    page.write_text(replaced(page.read_text(), section(docs / FOLDER)))
    return page
