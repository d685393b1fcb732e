"""A run as a table for the terminal."""

from __future__ import annotations

from collections import defaultdict

from rich.table import Table

from services.torture.gaps import quantile
from services.torture.results import Run, Trial


def table(run: Run) -> Table:
    """One line for each component and action."""
    found = Table(title=_title(run), title_justify="left")
    for name in ("component", "action", "trials", "streams", "gap p50", "gap p99"):
        found.add_column(name, justify="left" if name in ("component", "action") else "right")
    groups: dict[tuple[str, str], list[Trial]] = defaultdict(list)
    for trial in run.trials:
        groups[trial.row.component, trial.row.action.value].append(trial)
    for (component, action), trials in sorted(groups.items()):
        gaps = [one for trial in trials for one in trial.gaps]
        shown = [f"{quantile(gaps, share)} ms" if gaps else "-" for share in (0.5, 0.99)]
        streams = sum(trial.streams for trial in trials)
        found.add_row(component, action, str(len(trials)), str(streams), *shown)
    return found


def _title(run: Run) -> str:
    verdict = (
        "clean"
        if run.is_clean
        else (
            f"NOT CLEAN: {run.wrong} wrong, {run.lost} lost, {run.repeated} repeated, "
            f"{run.errors} errors, {run.leaks} leaks"
        )
    )
    checked = f"{run.streams_checked} streams and {run.tokens_checked} tokens checked"
    return f"seed {run.seed}: {len(run.trials)} faults in {run.seconds:.0f} s, {checked}: {verdict}"
