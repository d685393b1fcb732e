"""The command line of scripts/kills."""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.faults.batches import Operation
from tests.faults.repeat import Repeat, Tally


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/kills",
        description="Kills a real kvmanager between applying an operation and answering it, again and again, under a "
        "scripted executor that repeats its calls at the next one. Checks that nothing is lost or doubled.",
    )
    parser.add_argument("--kills", type=_positive, default=1000, help="managers to be killed (default: 1000)")
    parser.add_argument("--seed", type=int, default=None, help="makes a run repeatable (default: drawn, and printed)")
    asked = parser.parse_args()
    seed = asked.seed if asked.seed is not None else secrets.randbits(32)
    console = Console(stderr=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pagehold-kills-", dir="/dev/shm") as root:
        try:
            with Repeat(Path(root) / "state", seed) as repeat, _bar(console) as bar:
                task = bar.add_task("kills", total=asked.kills)
                for _ in repeat.kills(asked.kills):
                    bar.advance(task)
        except AssertionError:
            console.print(f"lost or doubled, seed {seed}:", style="bold red")
            console.print_exception()
            return 1
        except KeyboardInterrupt:
            return 130
    _print(repeat.tally, seed, time.monotonic() - began)
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("want a number above 0")
    return number


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


def _print(tally: Tally, seed: int, seconds: float) -> None:
    table = Table("killed behind", "kills", "repeats compared")
    for operation in Operation:
        table.add_row(operation.value, str(tally.kills[operation]), str(tally.compared[operation] or "-"))
    table.add_row("all", str(tally.kills.total()), str(tally.compared.total()), style="bold")
    console = Console()
    console.print(table)
    console.print(f"{tally.turns} turns in {seconds:.1f} s, seed {seed}: nothing lost, nothing doubled")


if __name__ == "__main__":
    sys.exit(main())
