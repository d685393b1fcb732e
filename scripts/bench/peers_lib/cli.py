"""The command line of scripts/bench/peers."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from peers_lib import children, page, scenario
from peers_lib.compare import Plan, compare, say
from peers_lib.contestant import BENCH, ENGINES, REPOSITORY, choose
from peers_lib.install import PLOTS_VENV, InstallError, install
from peers_lib.model import open_model
from peers_lib.modelfile import ModelFileError, find
from peers_lib.ratio import as_records, ratios
from peers_lib.report import Report, dump, load
from peers_lib.table import render

_UNITS: Final = {"MiB": 2**20, "GiB": 2**30}


def size(text: str) -> int:
    """`512MiB`, `2GiB`."""
    for unit, factor in _UNITS.items():
        if text.endswith(unit) and text.removesuffix(unit).isdigit():
            return int(text.removesuffix(unit)) * factor
    raise argparse.ArgumentTypeError("want a size such as 512MiB or 2GiB")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("want a number above 0")
    return number


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="scripts/bench/peers",
        description="Runs the same requests through Pagehold and through other engines on this machine, engine by "
        "engine in alternation, and prints tokens a second, latencies, memory, start-up and ratios.",
        epilog=f"Engines: {', '.join(f'{engine.name} ({engine.note})' for engine in ENGINES)}. "
        "Runs of some engines and scenarios, made at different times, can be put into one page. "
        "Progress goes to standard error, the table to standard output.",
    )
    names = ", ".join(each.name for each in scenario.SCENARIOS)
    found.add_argument("--scenarios", default="all", help=f"all, or some of {names}, parted by commas (default: all)")
    found.add_argument(
        "--engines",
        default="all",
        help="all, or some, parted by commas, as NAME or NAME:PART+PART..., where a part is a dtype or a flag without "
        "dashes: vllm:float32+prefix-cache, pagehold:speculation=off (any flag of `pagehold up`) (default: all)",
    )
    found.add_argument("--rounds", type=_positive, help="times that each engine runs (default: 3; 1 with --quick)")
    found.add_argument(
        "--together",
        action="store_true",
        help="keeps all engines up and lets them take turns at every scenario, for a machine whose speed changes from "
        "one minute to the next",
    )
    found.add_argument("--quick", action="store_true", help="tiny scenarios: whether it works, not how fast")
    found.add_argument("--json", type=Path, metavar="FILE", help="writes the results there")
    found.add_argument("--timeout", type=float, default=900.0, help="seconds for a start or a scenario (default: 900)")
    found.add_argument("--model", help="folder or .gguf file (default: the model of the demo extra)")
    found.add_argument("--kv-memory", type=size, default=size("2GiB"), help="page pool of each engine (default: 2GiB)")
    instead = found.add_mutually_exclusive_group()
    instead.add_argument(
        "--render", type=Path, nargs="+", metavar="FILE", help="prints the tables of files that --json wrote, as one"
    )
    instead.add_argument(
        "--page",
        action="store_true",
        help="writes docs/measurements.md and its pictures from docs/measurements/peers-*.json",
    )
    instead.add_argument(
        "--install", metavar="NAME", help="installs vllm, llama.cpp or plots, each in an environment of its own"
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    wanted = parser().parse_args(words)
    # A stop from outside runs the same clean-up as an interrupt.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        if wanted.render:
            print(render([load(path.read_text()) for path in wanted.render]), end="")
        elif wanted.page:
            _draw(page.DOCS / page.FOLDER)
            print(page.write())
        elif wanted.install:
            install(wanted.install)
        else:
            _compare(wanted, words)
    except (ValueError, OSError, InstallError, ModelFileError) as error:
        print(f"peers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _draw(folder: Path) -> None:
    """In the environment of its own. Without one, pictures that are there stay as they are."""
    python = REPOSITORY / PLOTS_VENV / "bin" / "python"
    if not python.exists():
        say("no new pictures: scripts/bench/peers --install plots")
        return
    command = [str(python), "-m", "peers_lib.plots", str(folder)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(BENCH)}, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"no pictures: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    print(done.stdout, end="")


def _compare(wanted: argparse.Namespace, words: Sequence[str]) -> None:
    plan = Plan(
        command=shlex.join(["scripts/bench/peers", *words]),
        contestants=choose(wanted.engines),
        scenarios=scenario.choose(wanted.scenarios, quick=wanted.quick),
        rounds=wanted.rounds or (1 if wanted.quick else 3),
        model=open_model(find(wanted.model)),
        kv_memory=wanted.kv_memory,
        timeout=wanted.timeout,
        together=wanted.together,
    )
    children.adopt_orphans()

    def keep(report: Report) -> None:
        if wanted.json:
            wanted.json.parent.mkdir(parents=True, exist_ok=True)
            wanted.json.write_text(dump(report, as_records(ratios(report))))

    report = compare(plan, keep)
    keep(report)
    print(render([report]), end="")
