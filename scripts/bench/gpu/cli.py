"""The command line of scripts/gpu-check."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gpu import machine, tables
from gpu.job import LIMIT_SECONDS, REPOSITORY, WORK, Job, Options, Part, PartError
from gpu.parts import PARTS
from gpu.report import Report, dump, load
from gpu.run import run


def parser() -> argparse.ArgumentParser:
    names = [part.name for part in PARTS]
    found = argparse.ArgumentParser(
        prog="scripts/gpu-check",
        description="Tests and measures Pagehold on this machine's GPU, in parts of under ten minutes.",
        epilog="Progress goes to standard error, tables to standard output. A part that is run again replaces its "
        "former results in the file; scripts/bench/measurements.py makes docs/measurements.md from such files.",
    )
    found.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(names)} (default: all)")
    found.add_argument("--json", type=Path, metavar="FILE", help="keeps results there, beside those of other parts")
    found.add_argument("--list", action="store_true", help="says what the parts do")
    found.add_argument("--fa3", type=Path, metavar="LIBRARY", help="FlashAttention-3's operators, as a peer")
    found.add_argument("--work", type=Path, default=WORK, metavar="FOLDER", help="for models (default: %(default)s)")
    found.add_argument(
        "--limit", type=float, default=LIMIT_SECONDS, metavar="SECONDS", help="of a part (default: %(default)s)"
    )
    found.add_argument("--device", choices=("gpu", "host"), default="gpu", help=argparse.SUPPRESS)
    found.add_argument("--child", type=int, metavar="FD", help=argparse.SUPPRESS)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    # A stop from outside runs the same clean-up as an interrupt.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    wanted = parser().parse_args(words)
    known = {part.name: part for part in PARTS}
    if unknown := [name for name in wanted.parts if name not in known]:
        print(f"gpu-check: no such part: {', '.join(unknown)}; --list shows them", file=sys.stderr)
        return 2
    chosen = [known[name] for name in dict.fromkeys(wanted.parts)] or list(PARTS)
    if wanted.list:
        width = max(len(part.name) for part in PARTS)
        print("\n".join(f"{part.name.ljust(width)}  {part.what}" for part in PARTS))
        return 0
    options = Options(wanted.device, wanted.fa3, wanted.work, wanted.limit)
    if wanted.child is not None:
        with os.fdopen(wanted.child, "w", buffering=1) as results:
            return child(chosen[0], options, lambda line: print(line, file=results))
    found = machine.examine(REPOSITORY)
    if found.gpu == machine.NO_GPU and not options.tiny:
        print("gpu-check: no GPU here: nvidia-smi finds none", file=sys.stderr)
        return 2
    try:
        report = load(wanted.json.read_text()) if wanted.json and wanted.json.exists() else Report()
    except (OSError, ValueError) as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    failed = False
    for part in chosen:
        ran = run(part, options, shlex.join(["scripts/gpu-check", *words]), found)
        failed |= bool(ran.reason)
        report = report.with_run(ran)
        if wanted.json:
            wanted.json.parent.mkdir(parents=True, exist_ok=True)
            wanted.json.write_text(dump(report))
    shown = Report({part.name: report.runs[part.name] for part in chosen})
    print(tables.render(shown), end="")
    return 1 if failed else 0


def child(part: Part, options: Options, lines: Callable[[str], None]) -> int:
    """Runs it in this process; its exit status."""
    try:
        part.run(Job(options, lines))
    except PartError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 3
    except ModuleNotFoundError as error:
        print(f"gpu-check: {error.name} is not installed: pip install '.[cuda13]'", file=sys.stderr)
        return 3
    return 0
