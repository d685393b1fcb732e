"""The linters, as `scripts/lint` runs them: style, types, layers, protos."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def test_lint() -> None:
    environment = {**os.environ, "PAGEHOLD_BIN": str(Path(sys.executable).parent)}
    done = subprocess.run([REPOSITORY / "scripts" / "lint"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
