"""Every family of kernels under the address and undefined-behaviour sanitizers, on the stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.kernels.cuda.checks import CHECKS

ROOT: Final = Path(__file__).parents[3]


def start(cache: Path, *names: str) -> subprocess.Popen[str]:
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.kernels.cuda.sanitized", str(cache), *names]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def test_kernels_stay_within_their_memory(host_cache: Path) -> None:
    names = [check.__name__ for check in CHECKS]
    runs = [start(host_cache, *names[first::2]) for first in range(2)]
    output = "".join(run.communicate()[0] for run in runs)
    assert [run.returncode for run in runs] == [0, 0], output
    assert sorted(output.split()) == sorted(["passed:", *names] + ["passed:"] * (len(names) - 1))


def test_a_write_past_an_array_is_caught(host_cache: Path) -> None:
    run = start(host_cache, "out_of_bounds")
    output, _ = run.communicate()
    assert run.returncode != 0
    assert "heap-buffer-overflow" in output and "out_of_bounds" in output, output
