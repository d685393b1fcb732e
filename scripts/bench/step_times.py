"""Streams that decode side by side through `pagehold up`, and of every step the share that was waiting for pages.

A step waits when there are sequences to run, but none has the page that its next token needs: that is the
manager's turn on the critical path of decoding, which asking ahead is to keep away from it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pagehold.client import Client, make_request
from services.cli.await_ready import await_ready
from services.executor.trace import StepLine

START_SECONDS = 180.0
STOP_SECONDS = 60.0
SPARE_TOKENS = 16  # so that the last stream still decodes when the first steps are over


@dataclass(frozen=True, slots=True)
class Summary:
    """Of steps in which all streams decode, or would if they had their pages."""

    steps: int
    streams: int
    step_us: float  # median
    step_us_p99: float
    outside_us: float  # median, of a step's time outside the runner
    run_share: float  # of the time of all steps, in the runner
    waiting_share_median: float  # of a step's time
    waiting_share_p99: float
    waiting_share_total: float
    steps_that_waited: int
    steps_with_left_out: int  # with a sequence left out for want of a page


class TooShort(Exception):
    """The trace has fewer steps than were asked for."""


def steady(lines: list[StepLine], streams: int, steps: int) -> list[StepLine]:
    """`steps` lines from the first on in which all streams decode. Raises TooShort."""
    starts = (n for n, line in enumerate(lines) if line.sequences == line.positions == streams)
    first = next(starts, len(lines))
    found = [line for line in lines[first:] if line.sequences + line.lacking >= streams][:steps]
    if len(found) < steps:
        raise TooShort(f"{len(found)} steps with {streams} streams, {steps} were wanted")
    return found


def summarize(lines: list[StepLine], streams: int) -> Summary:
    total, run, waited = (
        np.array([getattr(line, name) for line in lines]) for name in ("total_us", "run_us", "waited_us")
    )
    shares = waited / total
    return Summary(
        steps=len(lines),
        streams=streams,
        step_us=float(np.median(total)),
        step_us_p99=float(np.percentile(total, 99)),
        outside_us=float(np.median(total - run)),
        run_share=float(run.sum() / total.sum()),
        waiting_share_median=float(np.median(shares)),
        waiting_share_p99=float(np.percentile(shares, 99)),
        waiting_share_total=float(waited.sum() / total.sum()),
        steps_that_waited=int(np.count_nonzero(waited)),
        steps_with_left_out=sum(line.lacking > 0 for line in lines),
    )


def render(found: Summary) -> str:
    return (
        f"{found.steps} steps of {found.streams} streams that decode\n"
        f"step               {found.step_us / 1000:.2f} ms median, {found.step_us_p99 / 1000:.2f} ms p99, "
        f"{found.run_share:.1%} of it in the runner\n"
        f"waiting for pages  {found.waiting_share_median:.3%} of a step median, {found.waiting_share_p99:.3%} p99, "
        f"{found.waiting_share_total:.4%} of all time\n"
        f"                   {found.steps_that_waited} steps waited, "
        f"{found.steps_with_left_out} left a sequence out for want of a page\n"
    )


@contextmanager
def stack(folder: Path, trace: Path, kv_memory: str, model: str | None) -> Iterator[str]:
    """A running `pagehold up`; its address. Raises SystemExit when it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = [f"--state-dir={folder}/state", f"--listen={address}", f"--kv-memory={kv_memory}", f"--step-trace={trace}"]
    flags += [f"--model={model}"] if model else []
    command = [sys.executable, "-m", "services.cli.main", "up", "--log-level=warning", *flags]
    process = subprocess.Popen(command)
    try:
        if not await_ready(address, process.pid, START_SECONDS):
            raise SystemExit("steps: `pagehold up` did not become ready; see its messages above")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # its children die with it
            process.wait()


async def decode(address: str, streams: int, tokens: int) -> None:
    async with Client(address) as client:

        async def stream(number: int) -> None:
            # Different first tokens: streams that share no page.
            prompt = [100 + number] * 8
            request = make_request(prompt, max_tokens=tokens, temperature=1.0, seed=number, ignore_eos=True)
            async for _ in client.generate(request):
                pass

        await asyncio.gather(*map(stream, range(streams)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="steps", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=32, help="streams that decode side by side (32)")
    parser.add_argument("--steps", type=int, default=1000, help="steps that are looked at (1000)")
    parser.add_argument("--kv-memory", default="1GiB", help="size of the page pool (1GiB)")
    parser.add_argument("--model", help="as for `pagehold up`; default: its default")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--keep", type=Path, help="file for the trace, a line of JSON a step")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pagehold-steps-", dir="/dev/shm") as root:
        trace = wanted.keep.resolve() if wanted.keep else Path(root) / "trace"
        before = os.getloadavg()[0]
        with stack(Path(root), trace, wanted.kv_memory, wanted.model) as address:
            asyncio.run(decode(address, wanted.streams, wanted.steps + wanted.streams + SPARE_TOKENS))
        lines = [StepLine.from_json(line) for line in trace.read_text().splitlines()]
    try:
        found = summarize(steady(lines, wanted.streams, wanted.steps), wanted.streams)
    except TooShort as short:
        raise SystemExit(f"steps: {short}") from short
    print(render(found), end="")
    print(f"load average before the start: {before:.1f}, on {os.cpu_count()} processors")
    if wanted.json:
        wanted.json.write_text(json.dumps(asdict(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
