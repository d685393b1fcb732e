"""What follows from two readings: states and sums of the later one, rates of the time between them. Pure.

None is: unknown, for nobody answered, or there was nothing to divide by. A counter begins at 0 with its process, so
what a process counted that started between the two readings is all of the time between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from pagehold.admin.v1 import admin_pb2 as admin
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.progress import State
from services.cli.components import Component
from services.cli.view.reading import Reading

_ASKED: Final = {"kvmanager": kv.GetStatsResponse, "executor": ex.GetLoadResponse, "frontend": admin.GetTallyResponse}


@dataclass(frozen=True, slots=True)
class Process:
    """A component's row. A place whose process is down keeps it."""

    kind: str
    pid: int | None
    state: str
    uptime_seconds: float | None
    restarts: int | None  # processes of this name before it, or before the last one
    answer_seconds: float | None  # None: it was not asked, or said nothing
    is_silent: bool  # it serves, and said nothing
    gone_seconds: float | None  # since it was last seen; None: it runs, or was never seen


@dataclass(frozen=True, slots=True)
class Sequences:
    running: int | None  # that have a row
    waiting: int | None
    preemptions: int | None  # since the executor's start
    preemptions_per_second: float | None


@dataclass(frozen=True, slots=True)
class Tokens:
    prompt_per_second: float | None  # computed
    generated_per_second: float | None


@dataclass(frozen=True, slots=True)
class Steps:
    per_second: float | None
    seconds: float | None  # of one
    sequences: float | None  # of one
    tokens: float | None  # of one: of prompts and sampled
    busy: float | None  # share of the time; a step counts where it ends


@dataclass(frozen=True, slots=True)
class Pages:
    total: int | None
    used: int | None  # in rows
    shared: int | None  # of the used ones, those in two or more rows
    pinned: int | None  # of the used ones, those of pinned prefixes
    cached: int | None  # hold a prefix, and are given up for a new request
    empty: int | None


@dataclass(frozen=True, slots=True)
class Share:
    """Of tokens: between the readings, and since the process started."""

    now: float | None
    total: float | None


@dataclass(frozen=True, slots=True)
class Streams:
    """Of clients, at all frontends of this state folder."""

    open: int | None
    waiting: int | None  # without a token yet
    answers_per_second: float | None
    failures_per_second: float | None  # of them, with another status than OK
    first_token_seconds: float | None  # mean of those that came between the readings


@dataclass(frozen=True, slots=True)
class OutputRow:
    request_id: str
    index: int
    prompt: int
    cached: int
    computed: int
    generated: int
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    time: float  # of day
    seconds: float | None  # between the readings; None: there is only one
    components: dict[str, Process]
    epoch: int | None
    executor_attached: bool | None
    integrity_findings: int
    sequences: Sequences
    tokens: Tokens
    steps: Steps
    pages: Pages
    prefix_hits: Share  # of the prompt tokens that were looked up
    drafts_accepted: Share  # of those tried
    streams: Streams
    outputs: list[OutputRow]  # that have not ended, those of the latest request first

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        return {field.name: _rounded(found[field.name]) for field in fields(self)}


def compare(before: Reading | None, after: Reading, seen: Mapping[str, int]) -> Sample:
    """before: None at the first look. seen: when each process was last seen alive, by name, CLOCK_MONOTONIC in ns."""
    pair = _Pair(before, after)
    manager, executor = pair.of("kvmanager"), pair.of("executor")
    positions = _sum(executor.grown("prefill_tokens"), executor.grown("decode_tokens"))
    steps, busy = executor.grown("steps"), executor.grown("step_seconds")
    return Sample(
        time=after.time,
        seconds=pair.seconds,
        components={
            one.name: _process(one, after, seen.get(one.name))
            for one in after.components
            # Others that are down may have been so for days: a standby that became the executor is, by that name.
            if not one.is_down or one.name == one.kind or one.name in seen
        },
        epoch=manager.now("epoch"),
        executor_attached=manager.now("executor_attached"),
        integrity_findings=sum(one.findings for one in after.components),
        sequences=Sequences(
            running=executor.now("running"),
            waiting=executor.now("waiting"),
            preemptions=executor.now("preemptions"),
            preemptions_per_second=_ratio(executor.grown("preemptions"), pair.seconds),
        ),
        tokens=Tokens(
            prompt_per_second=_ratio(executor.grown("prefill_tokens"), pair.seconds),
            generated_per_second=_ratio(executor.grown("decode_tokens"), pair.seconds),
        ),
        steps=Steps(
            per_second=_ratio(steps, pair.seconds),
            seconds=_ratio(busy, steps),
            sequences=_ratio(executor.grown("step_sequences"), steps),
            tokens=_ratio(positions, steps),
            # A long step that began before the earlier reading would make it more than all of it.
            busy=_ratio(None if busy is None or pair.seconds is None else min(busy, pair.seconds), pair.seconds),
        ),
        pages=_pages(manager, executor),
        prefix_hits=_share(manager, "prefix_hit_tokens", "prefix_query_tokens"),
        drafts_accepted=_share(executor, "accepted_tokens", "draft_tokens"),
        streams=_streams([pair.of(one.name) for one in after.components if one.kind == "frontend"], pair.seconds),
        outputs=_outputs(before, after, pair.seconds),
    )


class _Counters:
    """One process's answer, and the one to count from."""

    def __init__(self, now: Any, base: Any) -> None:
        self.answer = now  # None: it said nothing
        self.base = base  # None: what grew since is unknown

    def now(self, name: str) -> Any:
        return None if self.answer is None else getattr(self.answer, name)

    def grown(self, name: str) -> Any:
        if self.answer is None or self.base is None:
            return None
        grown = getattr(self.answer, name) - getattr(self.base, name)
        return grown if grown >= 0 else None  # it was replaced just then


class _Pair:
    """Two readings."""

    def __init__(self, before: Reading | None, after: Reading) -> None:
        self._before = before
        self._after = after
        self.seconds = None if before is None else (after.at_ns - before.at_ns) / 1e9

    def of(self, name: str) -> _Counters:
        answer = self._after.answers.get(name)
        process = next((one for one in self._after.components if one.name == name), None)
        if answer is None or process is None:
            return _Counters(None, None)
        if self._before is None:
            return _Counters(answer.message, None)
        if process.started_ns > self._before.at_ns:
            return _Counters(answer.message, _ASKED[process.kind]())
        former = self._before.answers.get(name)
        return _Counters(answer.message, None if former is None else former.message)


def _process(one: Component, reading: Reading, seen_ns: int | None) -> Process:
    answer = reading.answers.get(one.name)
    return Process(
        kind=one.kind,
        pid=one.pid,
        state=one.state.label,
        uptime_seconds=None if one.is_down else max(reading.at_ns - one.started_ns, 0) / 1e9,
        restarts=one.starts - 1 if one.starts else None,
        answer_seconds=None if answer is None else answer.seconds,
        is_silent=answer is None and one.state in (State.READY, State.DRAINING, State.STALLED),
        gone_seconds=(reading.at_ns - seen_ns) / 1e9 if one.is_down and seen_ns is not None else None,
    )


def _pages(manager: _Counters, executor: _Counters) -> Pages:
    if manager.answer is None:
        # An executor knows how many are there and how many are in use, no more.
        total, free = executor.now("pages"), executor.now("free_pages")
        return Pages(total, None if total is None else total - free, None, None, None, None)
    stats = manager.answer
    return Pages(
        total=stats.pages,
        used=stats.pages - stats.free_pages,
        shared=stats.shared_pages,
        pinned=stats.pinned_pages,
        cached=stats.cached_pages,
        empty=stats.free_pages - stats.cached_pages,
    )


def _share(counters: _Counters, part: str, whole: str) -> Share:
    return Share(
        now=_ratio(counters.grown(part), counters.grown(whole)), total=_ratio(counters.now(part), counters.now(whole))
    )


def _streams(frontends: list[_Counters], seconds: float | None) -> Streams:
    heard = [one for one in frontends if one.answer is not None]
    if not heard:
        return Streams(None, None, None, None, None)
    known = [one for one in heard if one.base is not None]
    answers = failures = firsts = first_seconds = None
    if known:
        answers = sum(sum(one.answer.ended.values()) - sum(one.base.ended.values()) for one in known)
        failures = answers - sum(one.answer.ended.get("OK", 0) - one.base.ended.get("OK", 0) for one in known)
        firsts = sum(sum(one.answer.counts) - sum(one.base.counts) for one in known)
        first_seconds = sum(one.answer.seconds - one.base.seconds for one in known)
    return Streams(
        open=sum(one.answer.open for one in heard),
        waiting=sum(one.answer.waiting for one in heard),
        answers_per_second=_ratio(answers, seconds),
        failures_per_second=_ratio(failures, seconds),
        first_token_seconds=_ratio(first_seconds, firsts),
    )


def _outputs(before: Reading | None, after: Reading, seconds: float | None) -> list[OutputRow]:
    generated = {} if before is None else {(one.key, one.index): one.words.generated for one in before.outputs}
    return [
        OutputRow(
            request_id=one.request_id,
            index=one.index,
            prompt=one.words.prompt,
            cached=one.words.cached,
            computed=one.words.computed,
            generated=one.words.generated,
            # One that was not there before began since.
            tokens_per_second=_ratio(one.words.generated - generated.get((one.key, one.index), 0), seconds),
        )
        for one in after.outputs
    ]


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _rounded(value: Any) -> Any:
    """Floats to the microsecond, or what is like one: more digits say nothing."""
    match value:
        case float():
            return round(value, 6)
        case dict():
            return {name: _rounded(one) for name, one in value.items()}
        case list():
            return [_rounded(one) for one in value]
        case _:
            return value
