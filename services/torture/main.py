"""`pagehold torture`: proves, on the machine at hand, that any process may die and no stream is wrong."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import pagehold
from pagehold.runtime.failpoint import POINTS
from pagehold.runtime.settings import TortureSettings, UpSettings
from services.supervisor.flags import flags_of
from services.torture import results
from services.torture.bodies import MOST_BODIES, make_bodies
from services.torture.campaign import Campaign
from services.torture.checks import Checks
from services.torture.faults import Action, Chooser, Only
from services.torture.history import Deviation, Kind
from services.torture.injection import Injector
from services.torture.load import Load
from services.torture.matrix import render_page
from services.torture.results import Run
from services.torture.stack import Stack, StackFailed, is_gone
from services.torture.summary import table

_LEAST_BODIES: Final = 8


def main(settings: TortureSettings) -> int:
    """Returns the exit code: 0 all was right; 1 something was not, or the stack did not start; 2 wrong usage."""
    try:
        if settings.matrix is not None:
            return _write_matrix(settings)
        return asyncio.run(_run(settings))
    except ValueError as error:
        print(f"pagehold torture: {error}", file=sys.stderr)
        return 2
    except StackFailed as error:
        print(f"pagehold torture: {error}", file=sys.stderr)
        return 1


def _write_matrix(settings: TortureSettings) -> int:
    if settings.results is None or settings.matrix is None:
        raise ValueError("--matrix needs the --results to make it from")
    settings.matrix.write_text(render_page(results.read(settings.results), POINTS))
    return 0


async def _run(settings: TortureSettings) -> int:
    console = Console(stderr=True)
    seed = settings.seed if settings.seed is not None else random.SystemRandom().randrange(1 << 31)
    only = Only.parse(settings.only)
    earlier = results.read(settings.results) if settings.results is not None else []
    chooser = Chooser(seed, POINTS, results.trials_of(earlier), only, settings.standby)
    root = Path(tempfile.mkdtemp(prefix="pagehold-torture-", dir="/dev/shm"))
    flags = _flags(settings)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    run = Run(
        seed,
        pagehold.__version__,
        _commit(),
        _machine(),
        started,
        flags,
        settings.kv_memory or 0,
        round(os.getloadavg()[0], 1),
    )
    console.print(f"pagehold torture: seed {seed}, log {root / 'log'}")
    stack = Stack(root, flags, settings.frontends, settings.standby)
    deviations, last = await _torture(settings, stack, chooser, run, console)
    if settings.results is not None:
        results.append(settings.results, run)
    console.print(table(run))
    if deviations:
        for one in deviations[:20]:
            console.print(f"[red]{one}[/red]", highlight=False, markup=True)
        console.print(f"after {', '.join(last)}; seed {seed}; see {root}", highlight=False)
        return 1
    shutil.rmtree(root)
    return 0


async def _torture(
    settings: TortureSettings, stack: Stack, chooser: Chooser, run: Run, console: Console
) -> tuple[list[Deviation], list[str]]:
    """Deviations, and the latest faults. With deviations the stack is killed, and its files stay."""
    bodies = make_bodies(min(max(settings.streams * 3, _LEAST_BODIES), MOST_BODIES))
    load = Load(stack.address, bodies, run.seed, settings.streams)
    checks = Checks(stack, settings.record_ttl)
    injector = Injector(stack, load, run.seed, settings.hang_seconds, settings.record_ttl)
    campaign = Campaign(stack, load, chooser, injector, checks, run)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    try:
        await stack.start()
        console.print(f"measuring {len(bodies)} references undisturbed")
        await load.measure()
        campaign.deviations += load.deviations
        if not campaign.deviations:
            campaign.deviations += await checks.at_rest()
        if not campaign.deviations:
            with _progress(console) as bar:
                await campaign.go(_enough(settings, run, stopping), _shown(settings, run, campaign, bar))
        if not campaign.deviations:
            campaign.deviations += await _stop(stack)
            campaign.count()
    finally:
        load.cancel()
        stack.kill()
    return campaign.deviations, campaign.last


async def _stop(stack: Stack) -> list[Deviation]:
    """A clean stop leaves nothing, neither files nor processes."""
    pids = {one.instance: one.pid for one in stack.processes()}
    code = await asyncio.to_thread(stack.stop)
    found = []
    if code:
        found.append(Deviation(Kind.LEAK, "pagehold up", f"exit code {code}"))
    if stack.state.root.exists():
        found.append(Deviation(Kind.LEAK, "state folder", "a clean stop left it there"))
    found += [
        Deviation(Kind.LEAK, name, "it outlived its supervisor") for name, pid in pids.items() if not is_gone(pid)
    ]
    return found


def _enough(settings: TortureSettings, run: Run, stopping: asyncio.Event) -> Callable[[], bool]:
    if settings.kills is not None:
        wanted = settings.kills
        return lambda: stopping.is_set() or kills(run) >= wanted
    end = time.monotonic() + settings.seconds
    return lambda: stopping.is_set() or time.monotonic() > end


def kills(run: Run) -> int:
    """Trials in which a process was killed."""
    return sum(trial.row.action is Action.KILL for trial in run.trials)


def _progress(console: Console) -> Progress:
    return Progress(BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console, transient=True)


def _shown(settings: TortureSettings, run: Run, campaign: Campaign, bar: Progress) -> Callable[[], None]:
    total = settings.kills if settings.kills is not None else settings.seconds
    task: TaskID = bar.add_task("", total=total)

    def show() -> None:
        campaign.count()
        done = kills(run) if settings.kills is not None else run.seconds
        text = f"{len(run.trials)} faults, {run.streams_checked} streams checked, {len(campaign.deviations)} deviations"
        bar.update(task, completed=done, description=f"{text}; last {campaign.last[-1] if campaign.last else '-'}")

    return show


def _flags(settings: TortureSettings) -> list[str]:
    """Of `up`: those that were given, and those that torture gives another default."""
    given = flags_of(settings, UpSettings)
    for name in ("hang_seconds", "frontends", "standby", "record_ttl", "kv_memory"):
        if name not in settings.model_fields_set:
            value, flag = getattr(settings, name), name.replace("_", "-")
            given.append((f"--{flag}" if value else f"--no-{flag}") if isinstance(value, bool) else f"--{flag}={value}")
    return [flag for flag in given if flag != "--no-standby"]


def _commit() -> str:
    """Of the source tree, where there is one."""
    folder = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=folder, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _machine() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(os.sched_getaffinity(0))}-core {names[0] if names else 'machine'}"
