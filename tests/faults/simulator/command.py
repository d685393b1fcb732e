"""`scripts/simulate`: many schedules with a progress bar, or one of them again, event by event."""

from __future__ import annotations

import argparse
import sys
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.faults.simulator.campaign import OPERATIONS_A_SEED, Level, Report, play, play_all
from tests.faults.simulator.faults import Violation

_SHARE_OF_MESSAGES = 10  # one schedule in so many is of level 2, which costs more


def main() -> int:
    """0: everything held. 1: a seed did not."""
    options = _parse()
    if options.seed is not None:
        return _replay(Level(options.level if options.level is not None else 2), options.seed, options.trace)
    started = time.monotonic()
    reports = _run(_wanted(options), options.workers)
    for report in reports:
        print(report)
        for failure in report.failures[:5]:
            print(f"\nFAILED {failure}")
        if len(report.failures) > 5:
            print(f"and {len(report.failures) - 5} more: seeds {[failure.seed for failure in report.failures[5:50]]}")
    print(f"{time.monotonic() - started:.1f} s")
    return 1 if any(report.failures for report in reports) else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__)
    parser.add_argument("--schedules", type=int, default=0, help="schedules with kills; 10000 when nothing is named")
    parser.add_argument("--operations", type=int, default=0, help="random calls of the core, each followed by a check")
    parser.add_argument(
        "--level", type=int, choices=[int(level) for level in Level], help="only schedules of this level"
    )
    parser.add_argument("--seed", type=int, help="replay this one")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--trace", action="store_true", help="with --seed: print each event")
    parser.add_argument("--workers", type=int, help="processes; default: one a core")
    options = parser.parse_args()
    if not options.schedules and not options.operations:
        options.schedules = 10_000
    return options


def _wanted(options: argparse.Namespace) -> dict[Level, range]:
    first, wanted = options.first, dict[Level, range]()
    if options.operations:
        wanted[Level.OPERATIONS] = range(first, first + -(-options.operations // OPERATIONS_A_SEED))
    if options.schedules and options.level is not None:
        wanted[Level(options.level)] = range(first, first + options.schedules)
    elif options.schedules:
        messages = options.schedules // _SHARE_OF_MESSAGES
        wanted[Level.MESSAGES] = range(first, first + messages)
        wanted[Level.STORES] = range(first, first + options.schedules - messages)
    return wanted


def _run(wanted: dict[Level, range], workers: int | None) -> list[Report]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        bars = {level: progress.add_task(f"level {int(level)}", total=len(seeds)) for level, seeds in wanted.items()}
        return play_all(wanted, workers, lambda part: progress.advance(bars[part.level], part.seeds))


def _replay(level: Level, seed: int, trace: bool) -> int:
    try:
        counts = play(level, seed, print if trace else None)
    except Violation as violation:
        print(violation)
        return 1
    print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
