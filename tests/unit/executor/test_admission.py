"""Who asks for a row in a turn: in order, and nobody in place of one that has been refused or has lost its row."""

from __future__ import annotations

from pagehold.kv.v1 import kv_manager_pb2 as kv
from services.executor import calls
from services.executor.admission import Admission
from services.executor.scheduler import Scheduler
from services.executor.sequence import Sequence
from tests.unit.executor.test_scheduler import make, scheduler_of


def waiting(arrival: int, priority: int = 0) -> Sequence:
    sequence = make(arrival, running=False, priority=priority)
    sequence.lane.tokens[0] = 1000 + arrival  # shares no page with others
    sequence.opening = bytes([arrival])
    return sequence


class Turns:
    """An admission whose calls are answered by hand."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.taken: list[int] = []
        self.admission = Admission(scheduler, prefix_cache=True, fork=True, preempt=self._preempt)

    def _preempt(self, sequence: Sequence) -> kv.Call:
        self.taken.append(sequence.arrival)
        call = calls.close(sequence)
        self.scheduler.preempt(sequence)
        return call

    def asking(self) -> list[int]:
        """Arrivals of those that ask in the next turn."""
        self.admission.begin(1000.0)
        found = [call.ensure.key for call in self.admission.calls() if call.HasField("ensure")]
        return [int(key, 16) for key in found]

    def grant(self, sequence: Sequence) -> None:
        sequence.asking = False
        self.scheduler.start(sequence)

    def refuse(self, sequence: Sequence) -> None:
        sequence.asking = False
        self.admission.refused(sequence)


def test_as_many_as_there_are_lanes_and_not_more_than_a_few_at_once() -> None:
    turns = Turns(scheduler_of(make(1), *(waiting(number) for number in range(2, 9)), most=4))
    assert turns.asking() == [2, 3, 4] and turns.asking() == []
    many = Turns(scheduler_of(*(waiting(number) for number in range(40)), most=100))
    assert many.asking() == list(range(16))


def test_one_that_has_lost_its_row_asks_alone() -> None:
    lost = waiting(1)
    lost.preempted = True
    turns = Turns(scheduler_of(lost, waiting(2), waiting(3), most=8))
    assert turns.asking() == [1]
    assert turns.asking() == [], "nobody behind it, until it is answered"
    turns.grant(lost)
    assert turns.asking() == [2, 3]


def test_those_in_front_of_one_that_has_lost_its_row_do_not_wait_for_it() -> None:
    lost = waiting(5)
    lost.preempted = True
    turns = Turns(scheduler_of(lost, waiting(1), waiting(9, priority=2), waiting(7), most=8))
    assert turns.asking() == [9, 1, 5]


def test_behind_the_one_that_found_the_pool_full_nobody_asks() -> None:
    large, small = waiting(1), waiting(2)
    turns = Turns(scheduler_of(make(0), large, small, most=8))
    assert turns.asking() == [1, 2]
    turns.refuse(large)
    turns.refuse(small)
    assert turns.asking() == []
    turns.admission.freed()
    assert turns.asking() == [1] and turns.asking() == []


def test_one_in_front_of_the_blocked_one_asks_although_no_pages_came_back() -> None:
    blocked = waiting(1)
    turns = Turns(scheduler_of(make(0), blocked, most=8))
    turns.asking()
    turns.refuse(blocked)
    turns.scheduler.add(waiting(2, priority=1))
    turns.scheduler.add(waiting(3))
    assert turns.asking() == [2]


def test_a_lane_is_made_free_for_strictly_higher_priorities_alone() -> None:
    turns = Turns(scheduler_of(make(1), make(2, priority=1), waiting(3, priority=1), waiting(4, priority=1), most=2))
    assert turns.asking() == [3]
    assert turns.taken == [1]


def test_pressing_is_who_somebody_yields_to() -> None:
    high, equal = waiting(3, priority=1), waiting(2)
    turns = Turns(scheduler_of(make(1), high, equal, most=8))
    assert turns.admission.pressing() is None
    turns.asking()
    turns.refuse(equal)
    assert turns.admission.pressing() is None
    turns.refuse(high)
    assert turns.admission.pressing() is high
    assert not turns.admission.squeezed
    high.asking = True
    assert turns.admission.pressing() is None


def test_who_presses_without_a_lane_takes_a_row_at_once() -> None:
    high = waiting(3, priority=1)
    turns = Turns(scheduler_of(make(1), high, most=2))
    turns.asking()
    turns.refuse(high)
    turns.scheduler.add(make(2, priority=2))
    assert turns.admission.pressing() is high and turns.admission.squeezed
