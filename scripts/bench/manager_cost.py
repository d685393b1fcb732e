"""What the manager costs as a process of its own: steps of the real thing against steps of an executor that has the
manager's core within, in turns, round by round.

Both are real processes with a frontend and clients that stream; only the way from the executor to the pages differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from step_times import SPARE_TOKENS, START_SECONDS, STOP_SECONDS, Summary, TooShort, decode, steady, summarize

from services.cli.await_ready import await_ready
from services.executor.trace import StepLine

_JOINED: Final = Path(__file__).with_name("joined_executor.py")


class Way(StrEnum):
    """From the executor to the pages."""

    APART = "a manager's process, over gRPC"
    JOINED = "in the executor's process"


@dataclass(frozen=True, slots=True)
class Round:
    number: int
    way: Way
    summary: Summary


def commands(way: Way, folder: Path, address: str, trace: Path, kv_memory: str, model: str | None) -> list[list[str]]:
    """The processes of one stack, each with its flags."""
    program = [sys.executable, "-m", "services.cli.main"]
    shared = [f"--state-dir={folder}/state", "--log-level=warning", f"--parent-pid={os.getpid()}"]
    executor = [*shared, f"--kv-memory={kv_memory}", f"--step-trace={trace}", *([f"--model={model}"] if model else [])]
    found = [[*program, "frontend", *shared, f"--listen={address}"]]
    if way is Way.JOINED:
        return [*found, [sys.executable, str(_JOINED), *executor]]
    return [*found, [*program, "executor", *executor], [*program, "kvmanager", *shared]]


@contextmanager
def stack(way: Way, folder: Path, trace: Path, kv_memory: str, model: str | None) -> Iterator[str]:
    """Its address. Raises SystemExit when it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # as a supervisor sets it
    processes = [
        subprocess.Popen(command, env=environment)
        for command in commands(way, folder, address, trace, kv_memory, model)
    ]
    try:
        if not await_ready(address, processes[1].pid, START_SECONDS):
            raise SystemExit("manager: a stack did not become ready; see its messages above")
        yield address
    finally:
        # Whoever serves others goes after them.
        for process in processes:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def measure(way: Way, number: int, wanted: argparse.Namespace) -> Round:
    """One stack from start to stop. Raises SystemExit when there were too few steps."""
    with tempfile.TemporaryDirectory(prefix="pagehold-manager-", dir="/dev/shm") as root:
        trace = Path(root) / "trace"
        with stack(way, Path(root), trace, wanted.kv_memory, wanted.model) as address:
            asyncio.run(decode(address, wanted.streams, wanted.steps + wanted.streams + SPARE_TOKENS))
        lines = [StepLine.from_json(line) for line in trace.read_text().splitlines()]
    try:
        found = summarize(steady(lines, wanted.streams, wanted.steps), wanted.streams)
    except TooShort as short:
        raise SystemExit(f"manager: {short}") from short
    return Round(number, way, found)


def ratios(rounds: list[Round]) -> dict[str, list[float]]:
    """Apart over joined, round by round: of the step, and of what is not the runner's."""
    by_way = {way: [one.summary for one in rounds if one.way is way] for way in Way}
    pairs = list(zip(by_way[Way.APART], by_way[Way.JOINED], strict=True))
    return {
        "step": [apart.step_us / joined.step_us for apart, joined in pairs],
        "outside the runner": [apart.outside_us / joined.outside_us for apart, joined in pairs],
    }


def render(rounds: list[Round]) -> str:
    lines = [f"{'round':>5}  {'step, us':>9}  {'outside the runner, us':>22}  {'waited for pages':>16}  manager"]
    for one in rounds:
        found = one.summary
        lines.append(
            f"{one.number:>5}  {found.step_us:>9.0f}  {found.outside_us:>22.0f}  {found.waiting_share_total:>16.4%}  "
            f"{one.way}"
        )
    for what, found_ratios in ratios(rounds).items():
        each = ", ".join(f"{ratio:.3f}" for ratio in found_ratios)
        lines.append(f"{what}, apart over joined: median {statistics.median(found_ratios):.3f} of {each}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="manager", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=32, help="streams that decode side by side (32)")
    parser.add_argument("--steps", type=int, default=500, help="steps that are looked at in each round (500)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each runs (5)")
    parser.add_argument("--kv-memory", default="1GiB", help="size of the page pool (1GiB)")
    parser.add_argument("--model", help="as for `pagehold up`; default: its default")
    parser.add_argument("--json", type=Path, help="file for the figures")
    wanted = parser.parse_args()
    before = os.getloadavg()[0]
    rounds: list[Round] = []
    for number in range(1, wanted.rounds + 1):
        # Every other round runs backwards: what drifts on the machine meets both alike.
        for way in list(Way)[:: 1 if number % 2 else -1]:
            print(f"manager: round {number} of {wanted.rounds}: {way}", file=sys.stderr, flush=True)
            rounds.append(measure(way, number, wanted))
    print(render(rounds), end="")
    print(f"load average before the start: {before:.1f}, on {os.cpu_count()} processors")
    if wanted.json:
        wanted.json.write_text(json.dumps([asdict(one) for one in rounds], indent=1) + "\n")


if __name__ == "__main__":
    main()
