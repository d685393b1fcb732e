"""compute-sanitizer over kernel tests: some of every file."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from gpu.job import Job, PartError
from gpu.parts.kernels import Counts, kernel_tests, on_gpu, pytest

# Also where the toolkit is installed without being on the path.
_PLACES: Final = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
_SUMMARY: Final = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
_TESTS: Final = 6  # of a file, spread over it: every launch is many times slower than without the tool
_OPTIONS: Final = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}  # libraries probe, and errors follow


def run(job: Job) -> None:
    program = next((found for place in _PLACES if (found := shutil.which(place))), None)
    if program is None:
        raise PartError("compute-sanitizer is not installed: it is part of the CUDA toolkit")
    words = [*kernel_tests(), *on_gpu(), "--spread", str(_TESTS)]

    def check(tool: str) -> Counts:
        wrapper = [program, "--tool", tool, *_OPTIONS[tool], "--target-processes", "all", "--print-limit", "20"]
        return pytest(words, job.left(), wrapper)

    # Side by side: nothing is timed, and each keeps one processor busy.
    with ThreadPoolExecutor(len(_OPTIONS)) as pool:
        runs = {tool: pool.submit(check, tool) for tool in _OPTIONS}
    for tool, run in runs.items():
        try:
            counts = run.result()
        except PartError as error:
            job.note(f"{tool}: {error}")
            continue
        count = errors(counts.output)
        job.emit("sanitizer", (tool,), errors=count, passed=counts.passed, seconds=counts.seconds)
        if count or count is None or counts.code:
            job.note(f"{tool} ended with {counts.code}: {_shown(counts.output)}")


def errors(output: str) -> float | None:
    """What the tool counted in all processes; None where it said nothing, which is no clean pass."""
    found = [int(number) for number in _SUMMARY.findall(output)]
    return float(sum(found)) if found else None


def _shown(output: str) -> str:
    """The first complaint, in one line."""
    lines = [line.lstrip("= ") for line in output.splitlines() if line.startswith("=========")]
    return "; ".join(line for line in lines if line)[:400] or output.strip()[-200:]
