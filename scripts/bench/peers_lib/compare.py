"""The rounds: every contestant in turn on the same request files, and the report of it."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from peers_lib import requestfile
from peers_lib.contestant import OURS, PREFIX_CACHE, REPOSITORY, Contestant, missing
from peers_lib.machine import Machine, examine
from peers_lib.model import Model
from peers_lib.modelfile import ModelFileError, for_contestant
from peers_lib.report import Entrant, Load, Outcome, Report, Start
from peers_lib.run import Run, Session, ending
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
    together: bool = False  # all engines are up at once, and take turns at every scenario

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.together and any(PREFIX_CACHE in contestant.flags for contestant in self.contestants):
            raise ValueError(f"--together repeats requests to the same engines: not with {PREFIX_CACHE}")


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
        if plan.together:
            _take_turns(entries, plan, files, lambda: keep(_report(plan, started, machine, entries, files)))
            return _report(plan, started, machine, entries, files)
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
        _drop(entry, scenario.name, run)


def _drop(entry: _Entry, name: str, run: Run) -> None:
    if name not in run.traces:
        entry.dropped.setdefault(name, run.refused.get(name) or run.reason or "not run")


def _take_turns(entries: Sequence[_Entry], plan: Plan, files: _Files, keep: Callable[[], None]) -> None:
    """Scenario by scenario, one engine after the other: seconds lie between what is compared, not minutes."""
    up: list[tuple[_Entry, Session]] = []
    sessions: list[Session] = []
    loads = files.repeated(plan.rounds)
    with ending(sessions):
        for entry in entries:
            if entry.reason:
                continue
            say(f"{datetime.now():%H:%M:%S} start of {entry.contestant.name}")
            session = files.session(entry, plan, loads)
            sessions.append(session)
            up.append((entry, session))
            session.start()
            _tell(session.result)
        for number in range(1, plan.rounds + 1):
            for entry, session in up:
                whole = session.result
                entry.runs[number] = Run(whole.load_average, whole.reason, whole.version, whole.start_seconds)
                entry.runs[number].start_peak = whole.start_peak
            for scenario in plan.scenarios:
                say(f"{datetime.now():%H:%M:%S} round {number} of {plan.rounds}: {scenario.name}")
                for entry, session in up if number % 2 else reversed(up):
                    if scenario.name not in entry.dropped:
                        _take_turn(entry, session, scenario.name, number)
                keep()


def _take_turn(entry: _Entry, session: Session, name: str, number: int) -> None:
    run, whole, load = entry.runs[number], session.result, _repeated(name, number)
    session.turn(load)
    run.reason = whole.reason
    if load in whole.traces:
        run.traces[name] = [replace(trace, id=_original(trace.id)) for trace in whole.traces.pop(load)]
        run.peaks[name], run.others[name] = whole.peaks[load], whole.others[load]
        say(f"  {entry.contestant.name}: {_spent(run.traces[name])}")
    elif load in whole.refused:
        run.refused[name] = whole.refused[load]
    _drop(entry, name, run)
    if name in entry.dropped:
        say(f"  {entry.contestant.name}: {entry.dropped[name]}")


# An engine may keep the answers to requests by their ids: those of a later round have others.


def _repeated(id: str, number: int) -> str:
    return f"{id}@{number}"


def _original(id: str) -> str:
    return id.rpartition("@")[0]


class _Files:
    """The request files, drawn once."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._folder = folder
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

    def repeated(self, rounds: int) -> list[tuple[str, Path]]:
        """All loads of all rounds, in order."""
        found = []
        for number in range(1, rounds + 1):
            for name, path in self._paths.items():
                again = self._folder / f"{_repeated(name, number)}.jsonl"
                requests = (replace(request, id=_repeated(request.id, number)) for request in requestfile.read(path))
                requestfile.write(again, requests)
                found.append((_repeated(name, number), again))
        return found

    def session(self, entry: _Entry, plan: Plan, loads: Sequence[tuple[str, Path]]) -> Session:
        assert entry.model is not None
        most = max(map(len, self.wanted.values()))
        return Session(entry.contestant, entry.model, plan.kv_memory, self._warm_up, loads, most, plan.timeout)

    def perform(self, entry: _Entry, plan: Plan, *, loads: bool = True) -> Run:
        """Without loads the engine is only started and stopped."""
        paths = [(name, path) for name, path in self._paths.items() if loads and name not in entry.dropped]
        session = self.session(entry, plan, paths)
        with ending([session]):
            session.start()
            for name, _ in paths:
                session.turn(name)
        return session.result


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
        say(f"  {name}: {_spent(traces)}")
    for name, reason in run.refused.items():
        say(f"  {name}: {reason}")
    if run.reason:
        say(f"  {run.reason}")
        for line in run.log:
            print(f"    | {line[:300]}", file=sys.stderr)


def _spent(traces: Sequence[Trace]) -> str:
    tokens = sum(len(trace.token_ids) for trace in traces)
    last = max(arrival.at for trace in traces for arrival in trace.arrivals) if tokens else math.nan
    return f"{tokens} tokens in {last - min(trace.submitted for trace in traces):.1f} s"


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
            if traces is None and name not in entry.dropped:
                continue  # its turn is still to come
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
