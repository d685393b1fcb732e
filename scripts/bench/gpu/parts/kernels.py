"""The tests, in processes of their own: pytest over the kernel tests on this GPU, and over tests/gpu."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpu.job import REPOSITORY, Job, PartError, python_path

FOLDER: Final = "tests/kernels/cuda"
# Tests of the stand-in itself and of compilers, which a GPU has nothing to do with.
HOST_ONLY: Final = ("test_shim.py", "test_compile.py", "test_mutation.py", "test_sanitized.py")


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one pytest run; `output` is its terminal's."""

    passed: int
    failed: int
    skipped: int
    seconds: float
    code: int
    output: str

    @property
    def reason(self) -> str:
        """The last line that says something, for a run that broke off."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else "no output"


def run(job: Job) -> None:
    if not job.options.tiny:
        build_native(job)
    files = kernel_tests() if not job.options.tiny else []
    wanted = [(Path(file).stem.removeprefix("test_"), [file, *on_gpu()]) for file in files]
    only = "tests/gpu" if not job.options.tiny else "tests/unit/gpucheck/test_report.py"
    wanted.append(("what only a GPU has", [only, "--confcutdir", str(Path(only).parent if job.options.tiny else only)]))
    for name, words in wanted:
        counts = pytest(words, job.left())
        job.emit(
            "tests", (name,), passed=counts.passed, failed=counts.failed, skipped=counts.skipped, seconds=counts.seconds
        )
        if counts.code:
            print(counts.output[-6000:], file=sys.stderr)
            job.note(f"{name}: pytest ended with {counts.code}: {counts.reason}")


def build_native(job: Job) -> None:
    """Some kernel tests compare with the CPU's kernels, which a fresh checkout has not built."""
    if not (REPOSITORY / "kernels" / "cpu" / "libpagehold_cpu.so").exists():
        job.say("building the CPU's kernels")
        for words in (("-S", "kernels/cpu", "-B", "build/cpu"), ("--build", "build/cpu", "--parallel")):
            done = subprocess.run(["cmake", *words], cwd=REPOSITORY, capture_output=True, text=True)
            if done.returncode:
                job.note(f"cmake {words[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
                return


def kernel_tests() -> list[str]:
    """Files whose tests take a device."""
    found = sorted(path for path in (REPOSITORY / FOLDER).glob("test_*.py") if path.name not in HOST_ONLY)
    return [str(path.relative_to(REPOSITORY)) for path in found]


def on_gpu() -> list[str]:
    """What makes pytest run a kernel test on the GPU; conftests above it need a whole installation."""
    return ["-p", "tests.gpu.plugin", "--confcutdir", FOLDER]


def pytest(words: Sequence[str], limit: float, wrapper: Sequence[str] = ()) -> Counts:
    """Runs it, under `wrapper`. Raises PartError when it does not end."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [*wrapper, sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", "-p", "no:xdist", *words]
        try:
            done = subprocess.run(
                command,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": python_path(REPOSITORY)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=max(limit, 1.0),
            )
        except subprocess.TimeoutExpired as error:
            raise PartError(f"pytest {words[0]} did not end within the part's time") from error
        counts = _counts(report)
    return Counts(*counts, time.monotonic() - began, done.returncode, done.stdout)


def _counts(report: Path) -> tuple[int, int, int]:
    """Passed, failed, skipped; a run that broke off has none."""
    if not report.exists():
        return 0, 1, 0
    totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    failed = totals["failures"] + totals["errors"]
    return totals["tests"] - failed - totals["skipped"], failed, totals["skipped"]
