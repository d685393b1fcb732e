"""`pagehold top` without a terminal: what follows from two readings, and how it is laid out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from kvmanager.logwords import OutputWords
from pagehold.admin.v1 import admin_pb2 as admin
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.progress import State
from services.cli.components import Component
from services.cli.view.frame import Style, frame
from services.cli.view.outputs import Output
from services.cli.view.reading import Answer, Reading
from services.cli.view.sample import OutputRow, Pages, Sample, Share, compare

SECOND = 10**9
STARTED = 5 * SECOND
BEFORE = 100 * SECOND
AFTER = 102 * SECOND  # rates are of two seconds


def component(name: str, started_ns: int = STARTED, **options: Any) -> Component:
    return Component(name, name.partition("-")[0], State.READY, 7, started_ns, starts=3, **options)


def down(name: str) -> Component:
    return Component(name, name.partition("-")[0], State.DOWN, starts=3)


ALL = [component("frontend"), component("kvmanager"), component("executor")]
LOAD = ex.GetLoadResponse(
    running=4, waiting=2, pages=100, free_pages=60, prefill_tokens=1000, decode_tokens=500, preemptions=5,
    draft_tokens=80, accepted_tokens=20, steps=400, step_sequences=1600, step_seconds=8.0,
)  # fmt: skip
LATER = ex.GetLoadResponse(
    running=3, waiting=1, pages=100, free_pages=70, prefill_tokens=1300, decode_tokens=600, preemptions=6,
    draft_tokens=120, accepted_tokens=50, steps=500, step_sequences=1850, step_seconds=9.5,
)  # fmt: skip
STATS = kv.GetStatsResponse(
    pages=100, free_pages=60, cached_pages=25, shared_pages=10, pinned_pages=4, epoch=3, executor_attached=True,
    prefix_hit_tokens=300, prefix_query_tokens=1000,
)  # fmt: skip
LATER_STATS = kv.GetStatsResponse(
    pages=100, free_pages=60, cached_pages=25, shared_pages=10, pinned_pages=4, epoch=3, executor_attached=True,
    prefix_hit_tokens=600, prefix_query_tokens=1400,
)  # fmt: skip
TALLY = admin.GetTallyResponse(open=6, waiting=1, ended={"OK": 10, "CANCELLED": 1}, counts=[3, 8], seconds=4.0)
LATER_TALLY = admin.GetTallyResponse(open=5, waiting=2, ended={"OK": 13, "CANCELLED": 2}, counts=[5, 8], seconds=4.5)


def reading(
    at_ns: int,
    components: list[Component] | None = None,
    outputs: list[Output] | None = None,
    time: float = 1e9,
    **answers: Any,
) -> Reading:
    """answers: by name, with _ for -."""
    named = {name.replace("_", "-"): Answer(message, 0.002) for name, message in answers.items()}
    return Reading(time, at_ns, ALL if components is None else components, named, outputs or [])


def sample(before: Reading | None = None, after: Reading | None = None, **seen: int) -> Sample:
    before = before or reading(BEFORE, executor=LOAD, kvmanager=STATS, frontend=TALLY)
    after = after or reading(AFTER, executor=LATER, kvmanager=LATER_STATS, frontend=LATER_TALLY)
    return compare(before, after, {name.replace("_", "-"): when for name, when in seen.items()})


def output(key: str, index: int, generated: int, request_id: str = "") -> Output:
    return Output(key, request_id or f"id-{key}", index, OutputWords(20, 16, 20, 20 + generated, ended=False))


def text(found: Sample, width: int | None = None, height: int | None = None) -> str:
    return "\n".join(line.text for line in frame(found, "/run/state", width, height))


# --- what follows from two readings ---


def test_rates_are_of_the_time_between_two_readings() -> None:
    found = sample()
    assert found.seconds == 2.0
    assert (found.sequences.running, found.sequences.waiting, found.sequences.preemptions) == (3, 1, 6)
    assert found.sequences.preemptions_per_second == 0.5
    assert (found.tokens.prompt_per_second, found.tokens.generated_per_second) == (150, 50)
    steps = found.steps
    assert (steps.per_second, steps.seconds, steps.busy) == (50, 0.015, 0.75)
    assert (steps.sequences, steps.tokens) == (2.5, 4)
    assert found.prefix_hits == Share(now=0.75, total=600 / 1400)
    assert found.drafts_accepted == Share(now=0.75, total=50 / 120)
    assert found.pages == Pages(total=100, used=40, shared=10, pinned=4, cached=25, empty=35)
    streams = found.streams
    assert (streams.open, streams.waiting, streams.answers_per_second, streams.failures_per_second) == (5, 2, 2, 0.5)
    assert streams.first_token_seconds == 0.25
    assert (found.epoch, found.executor_attached) == (3, True)
    process = found.components["executor"]
    assert (process.pid, process.state, process.restarts, process.uptime_seconds) == (7, "ready", 2, 97)
    assert process.answer_seconds == 0.002 and not process.is_silent and process.gone_seconds is None


def test_no_executor_is_busier_than_always() -> None:
    assert sample(after=reading(AFTER, executor=ex.GetLoadResponse(steps=401, step_seconds=12.5))).steps.busy == 1


def test_the_first_look_knows_no_rate() -> None:
    found = compare(None, reading(AFTER, executor=LOAD, kvmanager=STATS, frontend=TALLY), {})
    assert found.seconds is None and found.tokens.generated_per_second is None and found.steps.seconds is None
    assert found.prefix_hits == Share(now=None, total=0.3)
    assert found.sequences.running == 4 and found.streams.open == 6 and found.streams.answers_per_second is None


def test_a_process_that_started_meanwhile_counts_from_zero() -> None:
    new = component("executor", started_ns=BEFORE + SECOND)
    after = reading(AFTER, [*ALL[:2], new], executor=LATER, kvmanager=LATER_STATS)
    found = sample(after=after)
    assert (found.tokens.prompt_per_second, found.steps.per_second) == (650, 250)
    # The same where it was down, or another one was there that said nothing.
    for before in (reading(BEFORE, [*ALL[:2], down("executor")]), reading(BEFORE)):
        assert sample(before, after).tokens.prompt_per_second == 650


def test_a_process_that_was_silent_before_has_no_rate_yet() -> None:
    found = sample(before=reading(BEFORE, kvmanager=STATS))
    assert found.tokens.prompt_per_second is None and found.steps.seconds is None
    assert found.sequences.running == 3 and found.prefix_hits.now == 0.75


def test_a_counter_that_went_back_has_no_rate() -> None:
    """It was replaced between the look at its progress and its answer."""
    found = sample(after=reading(AFTER, executor=ex.GetLoadResponse(decode_tokens=3, running=1)))
    assert found.tokens.generated_per_second is None and found.sequences.running == 1


def test_without_a_manager_the_executor_knows_the_pages() -> None:
    found = sample(after=reading(AFTER, [ALL[0], down("kvmanager"), ALL[2]], executor=LATER))
    assert found.pages == Pages(total=100, used=30, shared=None, pinned=None, cached=None, empty=None)
    assert found.epoch is None and found.prefix_hits == Share(None, None)


def test_with_nobody_all_is_unknown() -> None:
    nobody = [down(name) for name in ("frontend", "kvmanager", "executor")]
    found = sample(reading(BEFORE, nobody), reading(AFTER, nobody))
    assert found.pages.total is None and found.streams.open is None and found.tokens.generated_per_second is None
    assert {one.state for one in found.components.values()} == {"down"}


def test_streams_are_those_of_all_frontends() -> None:
    processes = [*ALL, component("frontend-2")]
    before = reading(BEFORE, processes, frontend=TALLY)
    after = reading(AFTER, processes, frontend=LATER_TALLY, frontend_2=TALLY)
    found = sample(before, after).streams
    assert (found.open, found.waiting) == (11, 3)
    assert found.answers_per_second == 2, "of the second one it is not known since when"
    processes[3] = component("frontend-2", started_ns=BEFORE + 1)
    assert sample(before, replace(after, components=processes)).streams.answers_per_second == 2 + 11 / 2


def test_outputs_have_rates() -> None:
    before = reading(BEFORE, outputs=[output("a", 0, 10), output("a", 1, 10)])
    after = reading(AFTER, outputs=[output("b", 0, 8), output("a", 0, 40), output("a", 1, 10)])
    found = sample(before, after).outputs
    assert found[0] == OutputRow("id-b", 0, 20, 16, 20, 8, 4.0)
    assert [one.tokens_per_second for one in found] == [4.0, 15.0, 0.0]
    assert compare(None, after, {}).outputs[0].tokens_per_second is None


def test_json_has_every_key_whoever_is_away() -> None:
    nobody = [down(name) for name in ("frontend", "kvmanager", "executor")]
    full = sample(
        before=reading(BEFORE, outputs=[output("a", 0, 1)]), after=reading(AFTER, outputs=[output("a", 0, 3)])
    )
    empty = compare(None, reading(AFTER, nobody), {})
    found = json.loads(json.dumps(full.to_json()))
    assert found["outputs"] == [
        {"request_id": "id-a", "index": 0, "prompt": 20, "cached": 16, "computed": 20, "generated": 3,
         "tokens_per_second": 1.0}
    ]  # fmt: skip
    assert json.loads(json.dumps(sample().to_json()))["prefix_hits"] == {"now": 0.75, "total": 0.428571}
    lacking = json.loads(json.dumps(empty.to_json()))
    assert lacking.keys() == found.keys()
    assert lacking["components"]["executor"]["pid"] is None
    for part in ("sequences", "tokens", "steps", "pages", "prefix_hits", "drafts_accepted", "streams"):
        assert lacking[part].keys() == found[part].keys()
        assert set(lacking[part].values()) == {None}


# --- how it is laid out ---


def test_a_frame_of_a_stack_at_work() -> None:
    shown = text(sample())
    assert "sequences     3 running, 1 waiting; 6 preempted so far, 0.5/s" in shown
    assert "tokens        150/s of prompts, 50/s generated" in shown
    assert "steps         15.0 ms for 2.5 sequences and 4.0 tokens; 50/s, 75 % of the time" in shown
    assert "prefix cache  75 % of prompt tokens found, 43 % since the manager's start" in shown
    assert "drafts        75 % accepted, 42 % since the executor's start" in shown
    assert "streams       5 open, 2 without a token yet; 2.0/s answered, 0.5/s failed; first token 250.0 ms" in shown
    assert "pages         100: 40 used (#), of them 10 shared (=) and 4 pinned; 25 cached (-), 35 empty (.)" in shown
    assert "executor            ready            7     1 min         2      2.0 ms  epoch 3" in shown


@pytest.mark.parametrize("width", [20, 56, 116, 1016])
def test_the_bar_shows_each_part_of_the_pool(width: int) -> None:
    bar = text(sample(), width).splitlines()[-1].strip()
    cells = width - 16
    assert bar[0] == "[" and bar[-1] == "]" and len(bar) == cells + 2
    for letter, share in {"#": 0.30, "=": 0.10, "-": 0.25, ".": 0.35}.items():
        assert abs(bar.count(letter) - share * cells) <= 1
    assert bar[1:-1] == "".join(sorted(bar[1:-1], key="#=-.".index))


def test_no_window_is_too_small() -> None:
    outputs = [output(f"{number}", 0, number) for number in range(30)]
    found = sample(after=reading(AFTER, executor=LATER, kvmanager=LATER_STATS, outputs=outputs))
    whole = text(found, 120)
    assert whole.splitlines()[-1].startswith("id-29")
    for width in range(1, 140, 3):
        for height in range(1, 60):
            lines = text(found, width, height).split("\n")
            assert len(lines) <= height and max(map(len, lines)) <= width
    lines = text(found, 120, 30).split("\n")
    assert len(lines) == 30
    listed = [line for line in lines if line.startswith("id-")]
    assert lines[-1] == f"and {30 - len(listed)} more" and len(listed) > 5
    room = len(whole.splitlines())
    assert text(found, 120, room) == whole and "more" not in whole
    assert text(found, 120, room - 1).endswith("\nand 2 more")


def test_a_process_that_is_gone_keeps_its_place() -> None:
    processes = [ALL[0], ALL[1], down("executor")]
    found = sample(after=reading(AFTER, processes, kvmanager=LATER_STATS), executor=AFTER - 3 * SECOND)
    (row,) = [line for line in frame(found, "") if line.text.startswith("executor")]
    assert row.text.split() == ["executor", "down", "-", "-", "2", "-", "gone", "for", "3", "s"]
    assert row.style is Style.ALARM
    (row,) = [line for line in frame(found, "") if line.text.startswith("kvmanager")]
    assert row.style is Style.PLAIN
    assert "-/s of prompts" in text(found)


def test_a_place_goes_to_a_successor_in_time() -> None:
    processes = [down("frontend"), component("frontend-2"), down("frontend-3"), *ALL[1:], down("executor-standby")]
    after = reading(AFTER, processes)

    def names(**seen: int) -> list[str]:
        rows = text(sample(after=after, **seen)).splitlines()[3:]
        return [row.split()[0] for row in rows[: rows.index("")]]

    assert names() == ["frontend-2", "kvmanager", "executor"]
    assert names(frontend=AFTER - 10 * SECOND) == ["frontend", "frontend-2", "kvmanager", "executor"]
    assert names(frontend=AFTER - 31 * SECOND) == ["frontend-2", "kvmanager", "executor"]
    assert names(frontend_3=AFTER - SECOND)[:2] == ["frontend-2", "frontend-3"]
    after = reading(AFTER, [down("frontend"), *ALL[1:]])
    assert names(frontend=AFTER - 999 * SECOND) == ["frontend", "kvmanager", "executor"], "no other one has come"


def test_what_is_wrong_is_said() -> None:
    silent = sample(after=reading(AFTER, kvmanager=kv.GetStatsResponse(pages=5, free_pages=5)))
    shown = text(silent)
    assert "kvmanager           ready            7     1 min         2      2.0 ms  no executor is attached" in shown
    assert shown.count("does not answer") == 2
    assert "the manager, who knows the rest, does not answer" in text(sample(after=reading(AFTER, executor=LATER)))
    findings = sample(after=reading(AFTER, [ALL[0], component("kvmanager", findings=3), ALL[2]]))
    assert "integrity: 3 findings; run pagehold fsck" in text(findings)
    nobody = compare(None, reading(AFTER, [down("frontend"), down("kvmanager"), down("executor")]), {})
    assert "nothing runs here; start it with `pagehold up`" in text(nobody)
    for found in (silent, findings, nobody):
        assert any(line.style is Style.ALARM for line in frame(found, ""))
    assert not any(line.style is Style.ALARM for line in frame(sample(), ""))


def test_a_process_that_starts_or_stands_by_is_not_called_silent() -> None:
    processes = [*ALL[:2], replace(ALL[2], state=State.STARTING), component("executor-standby")]
    processes[3] = replace(processes[3], state=State.STANDBY)
    shown = text(sample(after=reading(AFTER, processes, frontend=TALLY, kvmanager=STATS)))
    assert "does not answer" not in shown
    assert "executor-standby    standby" in shown


def test_no_id_speaks_to_the_terminal() -> None:
    ids = ["a\x1b[2Jb", "line\nbreak", "ünïcode\u202e", "x" * 300]
    outputs = [output(str(number), 0, 1, name) for number, name in enumerate(ids)]
    shown = text(sample(after=reading(AFTER, outputs=outputs)))
    assert shown.isascii() and shown.replace("\n", "").isprintable()
    assert "a?[2Jb" in shown and "line?break" in shown
    assert max(map(len, shown.splitlines())) < 120
