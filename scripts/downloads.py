"""Prints how much an installation downloaded, from pip's log: files from a cache count as well."""

from __future__ import annotations

import re
import sys
from pathlib import Path

_FILE = re.compile(
    r"(?:Downloading|Using cached) (\S+\.(?:whl|tar\.gz|zip))(?:\.metadata)? \(([\d.]+) (bytes|kB|MB|GB)\)"
)
_UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def downloaded(log: str) -> float:
    """Bytes. A file that several build environments ask for counts once."""
    sizes: dict[str, float] = {}
    for name, size, unit in _FILE.findall(log):
        key = name.rpartition("/")[2]
        sizes[key] = max(sizes.get(key, 0.0), float(size) * _UNITS[unit])
    return sum(sizes.values())


if __name__ == "__main__":
    total = downloaded(Path(sys.argv[1]).read_text(errors="replace"))
    print(f"pagehold: downloaded {total / 1e6:.0f} MB of packages, the build's tools and the model included")
