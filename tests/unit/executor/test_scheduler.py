"""The plan: decodes first, then prompts in order, every position in its row, the budget kept."""

from __future__ import annotations

import numpy as np
import pytest

from kvmanager.layout import OutputLog, RequestLog
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.v1 import inference_pb2 as api
from services.executor.runner.base import DraftLimits, Lane, SamplingParams
from services.executor.scheduler import Plan, Scheduler
from services.executor.sequence import Phase, Request, Sequence, StopRules

PAGE_SIZE = 16


def make(
    arrival: int,
    prompt: int = 20,
    computed: int = 0,
    known: int = 0,
    capacity: int = 1024,
    priority: int = 0,
    running: bool = True,
    read: bool = True,
) -> Sequence:
    """A sequence of distinct tokens; `read`: somebody has a stream on it."""
    buffer = bytearray(RequestLog.nbytes(1, prompt + 600, False))
    log = RequestLog.create(buffer, 1, prompt + 600, np.arange(1, prompt + 1, dtype=np.uint32), False)
    output: OutputLog = log.outputs[0]
    message = api.GenerateRequest(priority=priority)
    request = Request(f"{arrival:032x}", kv.RequestRecord(), message, StopRules(frozenset(), 0, 600))
    request.connection = object() if read else None  # type: ignore[assignment]
    lane = Lane(output.tokens, prompt, 0, SamplingParams())
    sequence = Sequence(request, 0, output, lane, arrival)
    request.sequences.append(sequence)
    sequence.committed, sequence.capacity = known or prompt, capacity
    sequence.settle(computed)
    sequence.phase = Phase.RUNNING if running else Phase.WAITING
    return sequence


def scheduler_of(*sequences: Sequence, budget: int = 64, most: int = 8, park_after: int = 32) -> Scheduler:
    scheduler = Scheduler(PAGE_SIZE, most, budget, park_after)
    for sequence in sequences:
        scheduler.add(sequence)
    return scheduler


def chunks(plan: Plan) -> list[tuple[int, int, int, int, bool]]:
    return [
        (sequence.arrival, chunk.start, chunk.count, chunk.write_from, chunk.sample)
        for sequence, chunk in zip(plan.sequences, plan.chunks, strict=True)
    ]


def test_decodes_come_before_prompts_that_came_earlier() -> None:
    plan = scheduler_of(make(1, prompt=100), make(2, computed=29, known=30), budget=40).plan()
    assert chunks(plan) == [(2, 29, 1, 29, True), (1, 0, 39, 0, False)]
    assert plan.positions == 40


def test_a_prompt_is_cut_to_the_budget_and_samples_only_at_its_end() -> None:
    sequence = make(1, prompt=100)
    scheduler = scheduler_of(sequence, budget=64)
    assert chunks(scheduler.plan()) == [(1, 0, 64, 0, False)]
    sequence.settle(64)
    assert chunks(scheduler.plan()) == [(1, 64, 36, 64, True)]


def test_prompts_share_what_is_left_in_order() -> None:
    plan = scheduler_of(make(2, prompt=30), make(1, prompt=50), make(3, prompt=9), budget=64).plan()
    assert chunks(plan) == [(1, 0, 50, 0, True), (2, 0, 14, 0, False)]


def test_more_decodes_than_budget_go_in_order() -> None:
    plan = scheduler_of(*(make(number, computed=29, known=30) for number in range(6)), budget=4).plan()
    assert [chunk[0] for chunk in chunks(plan)] == [0, 1, 2, 3]


def test_a_full_hit_runs_its_last_position_again_and_writes_nothing() -> None:
    assert chunks(scheduler_of(make(1, prompt=32, computed=32)).plan()) == [(1, 31, 1, 32, True)]


def test_nothing_is_planned_beyond_a_row() -> None:
    short = make(1, prompt=100, capacity=48)
    full = make(2, computed=32, known=33, capacity=32)
    spent = make(3, prompt=100, computed=48, capacity=48)
    assert chunks(scheduler_of(short, full, spent).plan()) == [(1, 0, 48, 0, False)]


def test_the_last_position_of_a_row_is_planned() -> None:
    assert chunks(scheduler_of(make(1, computed=31, known=32, capacity=32)).plan()) == [(1, 31, 1, 31, True)]


def test_parked_sequences_rest_and_those_that_are_read_do_not() -> None:
    unread = make(1, computed=20 + 31, known=20 + 32, read=False)
    little = make(2, computed=20 + 30, known=20 + 31, read=False)
    read = make(3, computed=20 + 99, known=20 + 100)
    prompt = make(4, prompt=20, known=20 + 32, read=False)  # preempted, then left
    scheduler = scheduler_of(unread, little, read, prompt)
    assert [chunk[0] for chunk in chunks(scheduler.plan())] == [2, 3]
    unread.cursor = 1
    assert [chunk[0] for chunk in chunks(scheduler.plan())] == [1, 2, 3]


def test_priority_comes_before_arrival() -> None:
    low, high = make(1, prompt=64, priority=-1), make(9, prompt=64, priority=5)
    plan = scheduler_of(low, make(2, prompt=64), high, budget=64).plan()
    assert chunks(plan)[0][0] == 9
    scheduler = scheduler_of(low, high)
    assert scheduler.running[-1] is low  # the first to give its row back


def test_admissible_counts_those_on_their_way() -> None:
    asking = make(3, running=False)
    asking.asking = True
    scheduler = scheduler_of(make(1), make(2), asking, make(4, running=False), most=5)
    assert scheduler.admissible() == 2
    scheduler.max_num_seqs = 1
    assert scheduler.admissible() == 0


def test_a_life_through_the_queues() -> None:
    sequence, other = make(1, running=False), make(2)
    scheduler = scheduler_of(sequence, other)
    scheduler.start(sequence)
    assert scheduler.running == [sequence, other] and not scheduler.waiting
    scheduler.preempt(other)
    assert scheduler.waiting == [other] and other.phase is Phase.WAITING
    scheduler.remove(other)
    scheduler.remove(sequence)
    assert not scheduler.waiting and not scheduler.running
    assert sequence.phase is other.phase is Phase.ENDED


def test_who_shares_a_page_that_is_being_filled() -> None:
    """All prompts here start alike: 1, 2, 3, …"""
    first, later = make(1, prompt=40), make(2, prompt=40, running=False)
    scheduler = scheduler_of(first, later)

    def waits() -> bool:
        return scheduler.shares_unfilled_page(later, scheduler.filling().get(later.opening, []))

    assert waits()
    first.settle(31)
    assert waits()  # the second page
    first.settle(32)
    assert not waits()  # the third is not shared: it ends beyond the prompt
    first.settle(40)
    assert not scheduler.filling()
    first.settle(0)
    later.lane.tokens[15] = 77
    assert not waits()


def test_one_that_asks_for_its_row_counts_as_filling() -> None:
    first, later = make(1, prompt=40, running=False), make(2, prompt=40, running=False)
    scheduler = scheduler_of(first, later)
    assert not scheduler.filling()
    first.asking = True
    assert scheduler.filling() == {first.opening: [first]}


LIMITS = DraftLimits(each=6, rows=20)


def drafts(*sequences: Sequence, allowed: int = 6, limits: DraftLimits = LIMITS) -> tuple[list[int], int]:
    """Of each chunk, and of all at most."""
    scheduler = scheduler_of(*sequences)
    scheduler.drafts = limits
    for sequence in sequences:
        sequence.drafting.allowed = allowed
    plan = scheduler.plan()
    assert plan.positions == sum(chunk.count for chunk in plan.chunks)
    return [chunk.drafts for chunk in plan.chunks], plan.drafts


def test_decodes_may_have_drafts() -> None:
    assert drafts(make(1, computed=29, known=30), allowed=4) == ([4], 4)
    assert drafts(make(1, computed=29, known=30), allowed=9) == ([6], 6)  # what the runner takes behind one chunk
    assert drafts(make(1, computed=30, known=30)) == ([6], 6)  # a full hit's last position, run again


def test_drafts_rest_until_their_time() -> None:
    resting, trying = make(1, computed=29, known=30), make(2, computed=29, known=30)
    resting.drafting.resumes_at, trying.drafting.resumes_at = 31, 30
    assert drafts(resting, trying) == ([0, 6], 6)


def test_drafts_stay_in_the_row_and_in_what_it_can_come_to_need() -> None:
    in_row = make(1, computed=29, known=30, capacity=32)
    full = make(2, computed=31, known=32, capacity=32)
    assert drafts(in_row, full) == ([2, 0], 2)
    ending = make(3, computed=29, known=30)
    ending.limit = 33
    last = make(4, computed=29, known=30)
    last.limit = 30
    assert drafts(ending, last) == ([3, 0], 3)


def test_there_are_fewer_drafts_the_more_positions_there_are() -> None:
    decodes = [make(number, computed=29, known=30) for number in range(12)]
    assert drafts(*decodes[:2]) == ([6] * 2, 12)
    assert drafts(*decodes[:6]) == ([6] * 6, 20 - 2 * 6)  # the runner shares them out
    assert drafts(*decodes[:9]) == ([6] * 9, 2)
    assert drafts(*decodes[:10]) == ([0] * 10, 0)
    assert drafts(make(20, prompt=5), *decodes[:2]) == ([6, 6, 0], 6)
    assert drafts(make(20, prompt=8), *decodes[:2]) == ([0, 0, 0], 0)


def test_room_for_few_each_gives_way_to_what_is_granted() -> None:
    limits = LIMITS._replace(granted=30)
    decodes = [make(number, computed=29, known=30) for number in range(6)]
    for sequence in decodes:
        sequence.drafting.likely = 3
    assert drafts(*decodes[:5], limits=limits) == ([6] * 5, 10)
    assert drafts(*decodes, limits=limits) == ([3] * 6, 18)


def test_where_there_is_no_room_drafts_are_granted_to_those_that_are_likely_right() -> None:
    limits = DraftLimits(each=6, rows=0, granted=12)
    decodes = [make(number, computed=29, known=30) for number in range(4)]
    for sequence, likely in zip(decodes, (9, 0, 3, 2), strict=True):
        sequence.drafting.likely, sequence.drafting.probes_at = likely, 31
    assert drafts(*decodes, limits=limits) == ([6, 0, 2, 0], 8)  # with their positions the twelve
    assert drafts(*decodes[1:], limits=limits) == ([0, 3, 2], 5)
    assert drafts(*decodes[1:], allowed=1, limits=limits) == ([0, 1, 1], 2)
    decodes[1].drafting.probes_at = 30
    assert drafts(*decodes[1:], limits=limits) == ([1, 3, 2], 6)
    assert drafts(make(20, prompt=10), *decodes[1:], limits=limits)[1] == 0
    assert drafts(make(20, prompt=8), *decodes[2:], limits=limits) == ([2, 0, 0], 2)


def test_a_step_with_drafts_is_within_its_tokens() -> None:
    with pytest.raises(AssertionError):
        Scheduler(PAGE_SIZE, 8, 16, 32, DraftLimits(each=6, rows=17))
    with pytest.raises(AssertionError):
        Scheduler(PAGE_SIZE, 8, 16, 32, DraftLimits(each=6, rows=8, granted=17))
    for tokens in range(16, 80):
        limits = DraftLimits(each=15, rows=64, granted=96).within(tokens)
        assert limits.granted <= tokens
        assert all(positions + limits.room(positions) <= tokens for positions in range(1, tokens + 1))
