"""Pictures of a machine's reports: `python -m peers_lib.plots FOLDER`, in the environment of `--install plots`.

FOLDER has the files peers-*.json; of each machine peers-NAME.speed.png, .first-token.png and .growth.png are written
there, as far as there is something to show.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from peers_lib import merge
from peers_lib.contestant import OURS
from peers_lib.merge import Row
from peers_lib.page import collect
from peers_lib.report import Report
from peers_lib.scenario import Group

_COLOURS: Final = {"pagehold": "#1b6ca8", "vllm": "#c0562c", "llama.cpp": "#5a8f3c", "transformers": "#8a8a8a"}
_COLUMNS: Final = 3
_DPI: Final = 110


def best_rows(reports: list[Report], scenario: str) -> list[Row]:
    """Of Pagehold all with figures; of a peer the fastest, unless flags tell its rows apart."""
    found = [row for row in merge.rows(reports, scenario) if row.outcomes]
    kept: dict[tuple[str, ...], Row] = {}
    for row in found:
        key = (row.entrant.engine, *row.entrant.flags, *([row.entrant.dtype] if row.entrant.engine == OURS else []))
        if key not in kept or row.speed > kept[key].speed:
            kept[key] = row
    return list(kept.values())


def bars(reports: list[Report], what: str, take: Callable[[Row], float], *, with_bound: bool) -> Any | None:
    """A panel for each scenario with a bar for each row."""
    names = [name for name, load in merge.scenarios(reports).items() if load.group is not Group.GROWTH]
    panels = {name: found for name in names if (found := best_rows(reports, name))}
    if not panels:
        return None
    pyplot: Any = import_module("matplotlib.pyplot")
    height = -(-len(panels) // _COLUMNS)
    figure, axes = pyplot.subplots(height, _COLUMNS, figsize=(4.6 * _COLUMNS, 2.2 * height), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, found) in zip(axes.flat, panels.items(), strict=False):
        labels = [row.entrant.name for row in found]
        drawn = axis.barh(labels, [take(row) for row in found], color=[_COLOURS[row.entrant.engine] for row in found])
        axis.bar_label(drawn, fmt="%.3g", padding=2, fontsize=7)
        if with_bound and found[0].bound:
            axis.axvline(found[0].bound.tokens_per_second, color="black", linestyle=":", linewidth=1)
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    note = "; dotted: the bound" if with_bound else ""
    figure.suptitle(f"{what}{note}", fontsize=11)
    return figure


def growth(reports: list[Report]) -> Any | None:
    """Step time over the number of sequences, and the bound."""
    loads = merge.scenarios(reports, Group.GROWTH)
    lines: dict[str, list[tuple[int, float]]] = {}
    engines: dict[str, str] = {}
    bound: list[tuple[int, float]] = []
    for name, load in loads.items():
        count = len(load.prompts)
        for row in merge.rows(reports, name):
            if not row.outcomes:
                continue
            lines.setdefault(row.entrant.name, []).append((count, row.step * 1000))
            engines[row.entrant.name] = row.entrant.engine
            if row.bound and bound[-1:] != [(count, row.bound.step * 1000)]:
                bound.append((count, row.bound.step * 1000))
    if not lines:
        return None
    pyplot: Any = import_module("matplotlib.pyplot")
    figure, axis = pyplot.subplots(figsize=(7.5, 4.5))
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=name, color=_COLOURS[engines[name]])
    if bound:
        axis.plot(*zip(*bound, strict=True), linestyle=":", color="black", label="the bound")
    axis.set(xscale="log", yscale="log", xlabel="sequences", ylabel="ms", title="Median decode step")
    counts = sorted({count for points in lines.values() for count, _ in points})
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.legend(fontsize=8)
    return figure


def draw(folder: Path) -> list[Path]:
    """The pictures that were written. Raises ValueError for files that do not belong together."""
    import_module("matplotlib").use("Agg")
    written = []
    for name, reports in collect(folder).items():
        merge.check(reports)
        figures = {
            "speed": bars(reports, "Tokens a second", lambda row: row.speed, with_bound=True),
            "first-token": bars(
                reports,
                "First token, p99, in seconds",
                lambda row: row.figure(lambda one: one.first_p99),
                with_bound=False,
            ),
            "growth": growth(reports),
        }
        for kind, figure in figures.items():
            if figure is not None:
                path = folder / f"peers-{name}.{kind}.png"
                figure.tight_layout()
                figure.savefig(path, dpi=_DPI)
                written.append(path)
    return written


if __name__ == "__main__":
    for made in draw(Path(sys.argv[1])):
        print(made)
