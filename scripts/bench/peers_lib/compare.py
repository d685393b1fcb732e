"""The rounds: every contestant in turn on the same request files, and the report of it."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from peers_lib import requestfile
from peers_lib.contestant import OURS, REPOSITORY, Contestant, missing
from peers_lib.machine import Machine, examine
from peers_lib.model import Model
from peers_lib.modelfile import ModelFileError, for_contestant
from peers_lib.report import Entrant, Load, Outcome, Report, Start
from peers_lib.run import Run, perform
from peers_lib.scenario import WARM_UP, Scenario
from peers_lib.trace import Figures, IncompleteError, Trace, agreement, figures

SEED: Final = 20260117


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asked for."""

    command: str
    contestants: tuple[Contestant, ...]
    scenarios: tuple[Scenario, ...]
    rounds: int
    model: Model
    kv_memory: int
    timeout: float


@dataclass(slots=True)
class _Entry:
    """A contestant during the comparison."""

    contestant: Contestant
    model: Path | None = None
    reason: str = ""
    version: str = ""
    first_start: float | None = None
    runs: dict[int, Run] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)  # scenarios that failed in an earlier round, and why

    def record(self) -> Entrant:
        engine = self.contestant.engine
        return Entrant(
            name=self.contestant.name,
            engine=engine.name,
            dtype=self.contestant.dtype,
            flags=self.contestant.flags,
            note=engine.note,
            version=self.version,
            reason=self.reason,
            first_start=self.first_start,
        )


def say(text: str) -> None:
    print(f"peers: {text}", file=sys.stderr, flush=True)


def compare(plan: Plan, keep: Callable[[Report], None]) -> Report:
    """`keep` gets what is known after every run, so that a comparison that is stopped has not been for nothing."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    say("measuring the machine")
    machine = examine(REPOSITORY)
    entries = [_Entry(contestant) for contestant in plan.contestants]
    with tempfile.TemporaryDirectory(prefix="pagehold-peers-") as folder:
        files = _Files(plan, Path(folder))
        for entry in entries:
            _prepare(entry, plan, files)
        for number in range(1, plan.rounds + 1):
            # Every other round runs backwards: what drifts on the machine meets all alike.
            for entry in entries if number % 2 else reversed(entries):
                if not entry.reason and len(entry.dropped) < len(plan.scenarios):
                    say(f"{datetime.now():%H:%M:%S} round {number} of {plan.rounds}: {entry.contestant.name}")
                    _run(entry, plan, files, number)
                    keep(_report(plan, started, machine, entries, files))
        return _report(plan, started, machine, entries, files)


def _report(plan: Plan, started: str, machine: Machine, entries: Sequence[_Entry], files: _Files) -> Report:
    return Report(
        command=plan.command,
        started=started,
        machine=machine,
        load_average_after=os.getloadavg()[0],
        model=plan.model.path.name,
        shape=plan.model.shape,
        kv_memory=plan.kv_memory,
        rounds=plan.rounds,
        scenarios=files.loads,
        entrants=[entry.record() for entry in entries],
        starts=[start for entry in entries for start in _starts(entry)],
        outcomes=[outcome for entry in entries for outcome in _outcomes(entry, entries, plan, files)],
    )


def _run(entry: _Entry, plan: Plan, files: _Files, number: int) -> None:
    """What failed once is not tried again: it would take its whole time limit in every round."""
    entry.runs[number] = run = files.perform(entry, plan)
    _tell(run)
    for scenario in plan.scenarios:
        if scenario.name not in run.traces:
            entry.dropped.setdefault(scenario.name, run.refused.get(scenario.name) or run.reason or "not run")


class _Files:
    """The request files, drawn once."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._warm_up = folder / "warm-up.jsonl"
        requestfile.write(self._warm_up, WARM_UP.draw(SEED))
        self._paths: dict[str, Path] = {}
        self.loads: dict[str, Load] = {}
        self.wanted: dict[str, dict[str, int]] = {}
        for scenario in plan.scenarios:
            requests = scenario.draw(SEED, plan.model.speak)
            self._paths[scenario.name] = folder / f"{scenario.name}.jsonl"
            requestfile.write(self._paths[scenario.name], requests)
            prompts = [len(request.prompt_token_ids) for request in requests]
            self.loads[scenario.name] = Load(scenario.title, scenario.group, prompts, scenario.max_tokens)
            self.wanted[scenario.name] = {request.id: request.max_tokens for request in requests}

    def perform(self, entry: _Entry, plan: Plan, *, loads: bool = True) -> Run:
        assert entry.model is not None
        paths = [(name, path) for name, path in self._paths.items() if loads and name not in entry.dropped]
        most = max(map(len, self.wanted.values()))
        return perform(entry.contestant, entry.model, plan.kv_memory, self._warm_up, paths, most, plan.timeout)


def _prepare(entry: _Entry, plan: Plan, files: _Files) -> None:
    """Finds out whether the contestant runs here at all. Fills its caches: of code, of the model, of the disk."""
    engine = entry.contestant.engine
    entry.reason = missing(engine)
    if not entry.reason:
        try:
            entry.model = for_contestant(entry.contestant, plan.model.path)
        except ModelFileError as error:
            entry.reason = str(error)
    if entry.reason:
        say(f"{entry.contestant.name}: {entry.reason}")
        return
    say(f"first start of {entry.contestant.name}")
    run = files.perform(entry, plan, loads=False)
    entry.version, entry.first_start, entry.reason = run.version, run.start_seconds, run.reason
    _tell(run)


def _tell(run: Run) -> None:
    if run.start_seconds is not None:
        say(f"  ready after {run.start_seconds:.1f} s")
    for name, traces in run.traces.items():
        tokens = sum(len(trace.token_ids) for trace in traces)
        last = max(arrival.at for trace in traces for arrival in trace.arrivals) if tokens else math.nan
        say(f"  {name}: {tokens} tokens in {last - min(trace.submitted for trace in traces):.1f} s")
    for name, reason in run.refused.items():
        say(f"  {name}: {reason}")
    if run.reason:
        say(f"  {run.reason}")
        for line in run.log:
            print(f"    | {line[:300]}", file=sys.stderr)


def _starts(entry: _Entry) -> list[Start]:
    return [
        Start(number, entry.contestant.name, run.start_seconds, run.start_peak, run.load_average)
        for number, run in sorted(entry.runs.items())
        if run.start_seconds is not None
    ]


def _outcomes(entry: _Entry, entries: Sequence[_Entry], plan: Plan, files: _Files) -> list[Outcome]:
    ours = next((other for other in entries if other.contestant.engine.name == OURS), None)
    found = []
    for number, run in sorted(entry.runs.items()):
        reference = ours.runs.get(number) if ours else None
        for scenario in plan.scenarios:
            name = scenario.name
            traces = run.traces.get(name)
            measured, reason = _measure(traces, files.wanted[name]) if traces else (None, entry.dropped[name])
            same = None
            if traces and measured and reference and name in reference.traces:
                same = agreement(traces, reference.traces[name])
            found.append(
                Outcome(
                    round=number,
                    entrant=entry.contestant.name,
                    scenario=name,
                    figures=measured,
                    peak_bytes=run.peaks.get(name, 0),
                    others=run.others.get(name),
                    agreement=same,
                    reason=reason,
                )
            )
    return found


def _measure(traces: list[Trace], wanted: dict[str, int]) -> tuple[Figures | None, str]:
    try:
        return figures(traces, wanted), ""
    except IncompleteError as error:
        return None, str(error)
