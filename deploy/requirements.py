"""Prints what pyproject.toml asks for: the package's own requirements, or those of one extra. For the Dockerfile.

Usage: requirements.py [EXTRA]
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
wanted = project["optional-dependencies"][sys.argv[1]] if len(sys.argv) > 1 else project["dependencies"]
print(*wanted, sep="\n")
