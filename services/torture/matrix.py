"""The page of all trials so far: what died where, and what streams felt of it. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from services.torture import faults
from services.torture.faults import ANYWHERE, Action, Row
from services.torture.gaps import quantile
from services.torture.results import Run, Trial

_PROMISES: Final = {
    Action.KILL: "goes on",
    Action.STOP: "is found, killed, goes on",
    Action.ERROR: "exits, goes on",
    Action.PAUSE: "goes on",
}
_FRONTEND_ERROR: Final = "is resumed"
_COMPONENTS: Final = (
    faults.EXECUTOR,
    faults.STANDBY,
    faults.MANAGER,
    faults.FRONTEND,
    faults.BOTH,
    faults.ALL,
    faults.EVERYTHING,
)


def render_page(runs: list[Run], points: Mapping[str, str]) -> str:
    """Markdown. points: name of each failpoint, and between what it lies."""
    parts = [_INTRODUCTION, _totals(runs), _gaps(runs), _contexts(runs), _matrix(runs, points), _runs(runs)]
    return "\n\n".join(parts) + "\n"


def _totals(runs: list[Run]) -> str:
    trials = _trials(runs)
    figures = [
        ("runs", len(runs)),
        ("faults", len(trials)),
        ("of which kills", sum(trial.row.action is Action.KILL for trial in trials)),
        ("hours under faults", f"{sum(run.seconds for run in runs) / 3600:.2f}"),
        ("streams checked to their end", sum(run.streams_checked for run in runs)),
        ("tokens checked", sum(run.tokens_checked for run in runs)),
        ("wrong tokens, texts, log-probabilities, reasons, usages", sum(run.wrong for run in runs)),
        ("lost", sum(run.lost for run in runs)),
        ("repeated", sum(run.repeated for run in runs)),
        ("errors that a client would see", sum(run.errors for run in runs)),
        ("checks at rest", sum(run.checks for run in runs)),
        ("leaks and contradictions found by them", sum(run.leaks for run in runs)),
    ]
    return "## Totals\n\n" + _table(("what", "how many"), [(name, str(value)) for name, value in figures])


def _gaps(runs: list[Run]) -> str:
    kinds: list[tuple[str, str, Callable[[Run, Trial], bool]]] = [
        ("executor, cold start", "p50 1.5 s", lambda run, one: _is(one, faults.EXECUTOR) and not run.has_standby),
        ("executor, standby ready", "p50 150 ms, p99 500 ms", lambda _, one: _is(one, faults.EXECUTOR) and one.standby),
        ("manager", "p50 1.0 s", lambda _, one: _is(one, faults.MANAGER)),
        ("frontend, resumed at another", "p50 300 ms", lambda _, one: _is(one, faults.FRONTEND)),
    ]
    rows = []
    for name, target, fits in kinds:
        for (pool, commit), alike in _alike(runs).items():
            if trials := [one for run in alike for one in run.trials if fits(run, one)]:
                rows.append((name, pool, commit, target, str(len(trials)), *_felt(trials)))
    head = ("killed", "page pool", "commit", "at most", "trials", "streams", "p50", "p99")
    return f"## Gaps\n\n{_GAPS}\n\n{_table(head, rows)}"


def _contexts(runs: list[Run]) -> str:
    groups: dict[str, list[Trial]] = defaultdict(list)
    for trial in _trials(runs):
        for context in trial.contexts or ["idle"]:
            groups[context].append(trial)
    rows = [
        (_CONTEXTS[name], str(len(groups[name])), str(sum(trial.streams for trial in groups[name])))
        for name in _CONTEXTS
    ]
    return f"## In the middle of what\n\n{_table(('when the fault came', 'trials', 'streams under way'), rows)}"


def _matrix(runs: list[Run], points: Mapping[str, str]) -> str:
    by_row: dict[Row, list[Trial]] = defaultdict(list)
    for trial in _trials(runs):
        by_row[trial.row].append(trial)
    wanted = faults.rows(points)
    parts = ["## Every place\n\n" + _PLACES]
    for component in _COMPONENTS:
        rows = []
        for row in (one for one in wanted if one.component == component):
            trials = by_row.get(row, [])
            between = points.get(row.point, "")
            point = f"`{row.point}`" if row.point != ANYWHERE else ANYWHERE
            wrong = sum(trial.wrong for trial in trials)
            where = f"{point}: {between}" if between else point
            rows.append((where, row.action.value, _promise(row), str(len(trials)), *_felt(trials, wrong)))
        head = ("between", "what", "promise: the stream", "trials", "streams", "wrong, lost, repeated", "p50", "p99")
        parts.append(f"### {component}\n\n{_table(head, rows)}")
    return "\n\n".join(parts)


def _runs(runs: list[Run]) -> str:
    rows = [
        (
            str(run.seed),
            run.commit or run.version,
            run.started,
            run.machine,
            f"`{' '.join(run.flags)}`",
            f"{run.load:.1f}",
            f"{run.seconds:.0f}",
            str(len(run.trials)),
            str(run.streams_checked),
            "clean" if run.is_clean else "NOT CLEAN",
        )
        for run in runs
    ]
    head = (
        "seed",
        "commit",
        "started",
        "machine",
        "flags of `up`",
        "load before",
        "seconds",
        "faults",
        "streams checked",
        "verdict",
    )
    return f"## Runs\n\n{_table(head, rows)}"


def _is(trial: Trial, component: str) -> bool:
    """A kill of this component while nothing else was down."""
    row = trial.row
    return row.component == component and row.action is Action.KILL and "recovery" not in trial.contexts


def _promise(row: Row) -> str:
    if row.component == faults.FRONTEND and row.action is not Action.PAUSE:
        return _FRONTEND_ERROR
    return _PROMISES[row.action]


def _felt(trials: list[Trial], wrong: int | None = None) -> tuple[str, ...]:
    """Streams under way, what was wrong if asked for, and two quantiles of the gaps."""
    gaps = [gap for trial in trials for gap in trial.gaps]
    quantiles = [_milliseconds(quantile(gaps, share)) if gaps else "-" for share in (0.5, 0.99)]
    found = [str(sum(trial.streams for trial in trials))]
    if wrong is not None:
        found.append(str(wrong) if trials else "-")
    return (*found, *quantiles)


def _milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value < 1000 else f"{value / 1000:.2f} s"


def _alike(runs: list[Run]) -> dict[tuple[str, str], list[Run]]:
    """Runs by the size of their pools, the largest first, and by commit, in order.

    In a small pool a stream may have to wait for pages, whatever died; and later commits are to be quicker.
    """
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: -run.pool_bytes):
        groups[f"{run.pool_bytes >> 20} MiB", run.commit.removesuffix("-dirty") or run.version].append(run)
    return dict(groups)


def _trials(runs: Iterable[Run]) -> list[Trial]:
    return [trial for run in runs for trial in run.trials]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


_CONTEXTS: Final = {
    "open": "a request is sent, and not accepted",
    "prefill": "a prompt is computed",
    "fork": "outputs of one request start from one prompt",
    "decode": "tokens come",
    "resume": "a client is coming back",
    "recovery": "something else is down, and not yet back",
}
_INTRODUCTION: Final = """# Crash matrix

Any process may die at any instruction, and every open stream goes on with the tokens of an undisturbed run. This page
counts how often that was tried, where, and what streams felt of it. It is made from `crash-matrix.json`, in which runs
of `pagehold torture` pile up:

```
pagehold torture --seconds 1200 --results docs/crash-matrix.json
pagehold torture --matrix docs/crash-matrix.md --results docs/crash-matrix.json
```

Each run starts a stack of its own, measures the reference of every request undisturbed, and then keeps streams under
way, greedy and seeded, with penalties, log-probabilities, stop strings, several outputs, shared prefixes and long
prompts, while one fault follows another. Every event of every stream is held against the reference: each offset once,
and tokens, text, log-probabilities, finish reasons and usage equal. Some clients drop their streams and resume them,
some cancel, some submit the same request twice at once. Whenever no request is open, `fsck` must be clean, and no page,
record, file, descriptor or memory may be left over. A run ends at the first deviation."""
_GAPS: Final = """From a client's last token before to its first token after, over all streams that the fault touched,
when nothing else was down. Killed by `kill -9`, at failpoints and at random instructions alike. Other work on the
machine makes them long: see the load of each run below."""
_PLACES: Final = """*Streams* counts those under way when the fault came. *Kill* is SIGKILL, *stop* is SIGSTOP, which
the supervisor must find out (`--hang-seconds 2`), *error* is an exception at that place, *pause* is SIGSTOP and then
SIGCONT before anybody finds out. Gaps include trials in the middle of another recovery."""
