"""A sample as lines of text, for a window of any size. Pure; ASCII, so that every terminal has the letters."""

from __future__ import annotations

import time
from enum import Enum
from typing import Final, NamedTuple

from pagehold.runtime.progress import State
from services.cli.view.sample import OutputRow, Process, Sample

_WIDTH: Final = 100  # where there is no window
_REMEMBERED_SECONDS: Final = 30.0  # that a process's place is kept when others of its kind serve
_NAME: Final = 20


class Style(Enum):
    PLAIN = 0
    TITLE = 1
    ALARM = 2


class Line(NamedTuple):
    text: str
    style: Style = Style.PLAIN


def frame(sample: Sample, place: str, width: int | None = None, height: int | None = None) -> list[Line]:
    """place: whose state this is. width, height: of the window, in characters; None: as long as it takes."""
    lines = _head(sample, place) + _components(sample) + _figures(sample, width or _WIDTH)
    lines += _outputs(sample.outputs, None if height is None else height - len(lines))
    lines = lines[:height]
    return lines if width is None else [Line(text[:width], style) for text, style in lines]


def _head(sample: Sample, place: str) -> list[Line]:
    clock = time.strftime("%H:%M:%S", time.localtime(sample.time))
    over = "" if sample.seconds is None else f"  the last {sample.seconds:.1f} s"
    lines = [Line(f"pagehold top  {_clean(place)}  {clock}{over}", Style.TITLE)]
    if all(one.pid is None for one in sample.components.values()):
        lines.append(Line("nothing runs here; start it with `pagehold up`, or name another --state-dir", Style.ALARM))
    if sample.integrity_findings:
        lines.append(Line(f"integrity: {sample.integrity_findings} findings; run pagehold fsck", Style.ALARM))
    return [*lines, Line("")]


def _components(sample: Sample) -> list[Line]:
    title = f"{'component':<{_NAME}}{'state':<10}{'pid':>8}{'up':>10}{'restarts':>10}{'answers in':>12}"
    lines = [Line(title, Style.TITLE)]
    for name, one in sample.components.items():
        if _has_a_place(name, one, sample):
            text = (
                f"{_clean(name):<{_NAME}}{one.state:<10}{_or_dash(one.pid):>8}{_duration(one.uptime_seconds):>10}"
                f"{_or_dash(one.restarts):>10}{_time(one.answer_seconds):>12}  {_remark(name, one, sample)}"
            )
            lines.append(Line(text.rstrip(), _style(one)))
    return [*lines, Line("")]


def _has_a_place(name: str, one: Process, sample: Sample) -> bool:
    """One that is down loses its place, in time, to another of its kind: a frontend to its successor."""
    if one.pid is not None or (one.gone_seconds is not None and one.gone_seconds <= _REMEMBERED_SECONDS):
        return True
    others = any(other.kind == one.kind and other.pid is not None for other in sample.components.values())
    return name == one.kind and not others


def _remark(name: str, one: Process, sample: Sample) -> str:
    if one.gone_seconds is not None:
        return f"gone for {_duration(one.gone_seconds)}"
    if one.is_silent:
        return "does not answer"
    if name == "kvmanager" and sample.executor_attached is False:
        return "no executor is attached"
    if name == "executor" and sample.executor_attached:
        return f"epoch {sample.epoch}"
    return ""


def _style(one: Process) -> Style:
    ailing = one.pid is None or one.is_silent or one.state == State.STALLED.label
    return Style.ALARM if ailing else Style.PLAIN


def _figures(sample: Sample, width: int) -> list[Line]:
    sequences, tokens, steps, streams = sample.sequences, sample.tokens, sample.steps, sample.streams
    rows = [
        (
            "sequences",
            f"{_or_dash(sequences.running)} running, {_or_dash(sequences.waiting)} waiting; "
            f"{_or_dash(sequences.preemptions)} preempted so far, {_rate(sequences.preemptions_per_second)}",
        ),
        ("tokens", f"{_rate(tokens.prompt_per_second)} of prompts, {_rate(tokens.generated_per_second)} generated"),
        (
            "steps",
            f"{_time(steps.seconds)} for {_mean(steps.sequences)} sequences and {_mean(steps.tokens)} tokens; "
            f"{_rate(steps.per_second)}, {_percent(steps.busy)} of the time",
        ),
        (
            "prefix cache",
            f"{_percent(sample.prefix_hits.now)} of prompt tokens found, "
            f"{_percent(sample.prefix_hits.total)} since the manager's start",
        ),
        (
            "drafts",
            f"{_percent(sample.drafts_accepted.now)} accepted, "
            f"{_percent(sample.drafts_accepted.total)} since the executor's start",
        ),
        (
            "streams",
            f"{_or_dash(streams.open)} open, {_or_dash(streams.waiting)} without a token yet; "
            f"{_rate(streams.answers_per_second)} answered, {_rate(streams.failures_per_second)} failed; "
            f"first token {_time(streams.first_token_seconds)}",
        ),
        ("pages", _pages(sample)),
    ]
    return [*(Line(f"{name:<14}{text}") for name, text in rows), Line(_bar(sample, width - 16))]


def _pages(sample: Sample) -> str:
    pages = sample.pages
    if pages.total is None:
        return "-"
    text = f"{pages.total:,}: {_or_dash(pages.used)} used (#)"
    if pages.cached is None:
        return f"{text}; the manager, who knows the rest, does not answer"
    return (
        f"{text}, of them {_or_dash(pages.shared)} shared (=) and {_or_dash(pages.pinned)} pinned; "
        f"{_or_dash(pages.cached)} cached (-), {_or_dash(pages.empty)} empty (.)"
    )


def _bar(sample: Sample, width: int) -> str:
    """The pool as a picture: each character is an equal part of its pages."""
    pages = sample.pages
    if not pages.total or pages.used is None or width < 1:
        return ""
    shared, cached = pages.shared or 0, pages.cached or 0
    cells, pages_so_far = "", 0
    for letter, count in (("#", pages.used - shared), ("=", shared), ("-", cached)):
        pages_so_far += count
        cells = cells.ljust(min(round(pages_so_far * width / pages.total), width), letter)
    return f"{'':<14}[{cells.ljust(width, '.')}]"


def _outputs(outputs: list[OutputRow], room: int | None) -> list[Line]:
    """room: lines; the title, an empty one, and one that says how many are left out take of it."""
    if not outputs:
        return []
    shown = outputs if room is None or len(outputs) + 2 <= room else outputs[: max(room - 3, 0)]
    names = [_clean(one.request_id) for one in shown]
    width = min(max(map(len, ["request", *names])), 40) + 2
    title = f"{'request':<{width}}{'output':>6}{'prompt':>9}{'cached':>9}{'computed':>10}{'generated':>11}{'rate':>12}"
    lines = [Line(""), Line(title, Style.TITLE)]
    for name, one in zip(names, shown, strict=True):
        lines.append(
            Line(
                f"{name[: width - 2]:<{width}}{one.index:>6}{one.prompt:>9,}{one.cached:>9,}{one.computed:>10,}"
                f"{one.generated:>11,}{_rate(one.tokens_per_second):>12}"
            )
        )
    if left := len(outputs) - len(shown):
        lines.append(Line(f"and {left:,} more"))
    return lines


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _rate(value: float | None) -> str:
    if value is None:
        return "-/s"
    return f"{value:,.0f}/s" if value >= 10 or value == 0 else f"{value:.1f}/s"


def _percent(value: float | None) -> str:
    return "- %" if value is None else f"{100 * value:.0f} %"


def _time(seconds: float | None) -> str:
    """How long something took."""
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _duration(seconds: float | None) -> str:
    """For how long something has been so."""
    if seconds is None:
        return "-"
    minutes, hours, days = int(seconds) // 60, int(seconds) // 3600, int(seconds) // 86400
    if not minutes:
        return f"{seconds:.0f} s"
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if not days else f"{days} d {hours % 24} h"


def _clean(text: str) -> str:
    """Ids are the clients': nothing in them may speak to the terminal."""
    return "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in text)
