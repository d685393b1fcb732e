"""A scripted executor: the order of its stores and calls is the product's, its arithmetic is the model's.

calls ──▶ manager ──▶ answers ── on their way ──▶ taken in order
                                   meanwhile sequences with a row run on
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from kvmanager.core import Granted
from kvmanager.errors import Refusal, Refused
from kvmanager.keys import words_key
from kvmanager.layout import PageState, Reason, RowState, generation_of, index_of, state_of, usable_computed
from kvmanager.matching import PageCopy
from tests.faults.simulator.faults import Countdown, ExecutorKilled, Violation
from tests.faults.simulator.model import Vector, next_token
from tests.faults.simulator.stores import asking
from tests.faults.simulator.stores.asking import Growth
from tests.faults.simulator.stores.checks import Checks
from tests.faults.simulator.stores.requests import PAGE_SIZE, SHAPE
from tests.faults.simulator.stores.running import Running
from tests.faults.simulator.stores.world import Act, Answer, World

Taker = Callable[[Answer], None]


class Executor:
    """Dies before a planned one of its own stores; all it knows is made again from the shared bytes."""

    def __init__(self, world: World, checks: Checks, number: int, stores: Countdown) -> None:
        self._world = world
        self._checks = checks
        self._stores = stores
        self._pending: deque[tuple[Taker, Answer]] = deque()
        self.sequences: dict[tuple[str, int], Running] = {}
        self.unfinished: list[Running] = []
        self.closed: list[tuple[Running, int, int]] = []  # sequence, row, generation: of rows that are gone
        self.copied_tokens = 0
        self.forks = 0
        identity = number.to_bytes(16, "little")
        before = world.core.epoch
        epoch = world.call(lambda core: core.attach(identity))
        if not isinstance(epoch, int) or epoch <= before:
            raise Violation("a new executor was given an old epoch")
        for key in list(world.records):
            self.load(key)
        self._adopt_rows()
        for sequence in self.unfinished:
            if sequence.row < 0 and sequence.log.computed:
                self._lower(sequence)

    def _adopt_rows(self) -> None:
        tables = self._world.tables
        for row, word in enumerate(tables.row_word.tolist()):
            if state_of(word) == RowState.LIVE:
                sequence = self.sequences[words_key(tables.row_key[row]), index_of(word)]
                capacity = int(tables.row_length[row]) * PAGE_SIZE
                self._checks.asked(generation_of(word), capacity)
                self._bind(sequence, row, generation_of(word), capacity)
                if sequence.log.ended:
                    self._close(sequence)

    def load(self, key: str) -> None:
        for truth, log in zip(self._world.requests[key].truth.outputs, self._world.records[key].outputs, strict=True):
            sequence = self.sequences[key, truth.index] = Running(truth, log)
            if log.ended:
                continue
            self.unfinished.append(sequence)
            if log.known == log.capacity:
                self._end(sequence, Reason.LENGTH)  # a death between the last token and its terminal word

    # --- what there is to do ---

    @property
    def with_row(self) -> list[Running]:
        """And no answer about it on its way."""
        return [sequence for sequence in self.unfinished if sequence.row >= 0 and not sequence.asking]

    @property
    def waits(self) -> bool:
        """Whether an answer is on its way."""
        return bool(self._pending)

    def forgettable(self) -> list[str]:
        """Keys of requests that are over, in all their outputs."""
        busy = {s.key for s in self.sequences.values() if s.row >= 0 or s.asking or not s.log.ended}
        return [key for key in dict.fromkeys(key for key, _ in self.sequences) if key not in busy]

    def _store(self) -> None:
        if self._stores.due():
            raise ExecutorKilled

    # --- calls and their answers ---

    def _send(self, calls: list[tuple[Act, Taker]]) -> None:
        answers = self._world.exchange([act for act, _ in calls])
        self._pending.extend((take, answer) for (_, take), answer in zip(calls, answers, strict=True))

    def receive(self, most: int) -> None:
        """Takes the oldest answers."""
        for _ in range(min(most, len(self._pending))):
            take, answer = self._pending.popleft()
            take(answer)

    def ask(self, headroom: int, keep_free: int) -> None:
        """Everybody without a place for the next position asks for one: rows one by one, growth all at once."""
        calls: list[tuple[Act, Taker]] = []
        wanting = [sequence for sequence in self.unfinished if sequence.wants]
        # An output that was cancelled may have a row that its executor has not heard of.
        busy = (other for other in self.sequences.values() if other.row >= 0 or other.asking)
        alone = len(wanting) == 1 and all(other is wanting[0] for other in busy)
        keep_free = 0 if alone else keep_free
        for sequence in wanting:
            if sequence.row >= 0:
                continue
            parent = self._parent(sequence)
            extra = min(headroom, sequence.limit - sequence.need)
            act = asking.first_row(sequence, parent, extra, keep_free)
            calls.append((act, partial(self._granted, sequence, sequence.need + extra, alone)))
            self.forks += parent is not None
        growing = [sequence for sequence in wanting if sequence.row >= 0]
        if growing:
            growth = asking.growth(growing, self.closed[-2:], headroom)
            for sequence, most in zip(growth.sequences, growth.most, strict=True):
                self._checks.asked(sequence.generation, most)
            calls.append((growth.act, partial(self._grown, growth, alone)))
        for sequence in wanting:
            sequence.asking = True
        self._send(calls)

    def _parent(self, sequence: Running) -> Running | None:
        """A sibling that has computed the prompt."""
        if sequence.log.computed:
            return None
        for other in self.with_row:
            if other.key == sequence.key and other.computed >= other.log.prompt_length and not other.log.ended:
                return other
        return None

    def _granted(self, sequence: Running, most: int, alone: bool, answer: Answer) -> None:
        sequence.asking = False
        if isinstance(answer, Refused):
            self._refused(sequence, alone, answer)
            return
        assert isinstance(answer, Granted)
        if not answer.generation:
            return  # the sibling's row was gone: asks again
        self._checks.asked(answer.generation, max(most, answer.cached))
        if sequence.log.ended:
            self._send([(asking.close(sequence, answer.generation), _nothing)])
            return
        if answer.capacity < sequence.need:
            raise Violation("granted less than the need")
        self._bind(sequence, answer.row, answer.generation, answer.capacity)
        if answer.copy is not None:
            self._copy(sequence, answer.cached, answer.copy)

    def _refused(self, sequence: Running, alone: bool, refused: Refused) -> None:
        if refused.reason not in (Refusal.NO_PAGES, Refusal.NO_ROWS):
            raise Violation(f"refused for good: {refused}")
        if alone:
            raise Violation(f"refused although nobody else holds a page: {refused}")
        sequence.short = True

    def _grown(self, growth: Growth, alone: bool, answer: Answer) -> None:
        if isinstance(answer, Refused):
            raise Violation(f"growth refused: {answer}")
        held = growth.check(answer)
        for sequence, generation, capacity in zip(growth.sequences, growth.generations, held, strict=True):
            sequence.asking = False
            if sequence.generation != generation:
                continue  # ended meanwhile
            if not capacity:
                raise Violation("a live row is said to be gone")
            sequence.capacity = capacity
            if sequence.capacity < sequence.need:
                if alone:
                    raise Violation("no page although nobody else holds one")
                sequence.short = True

    def _bind(self, sequence: Running, row: int, generation: int, capacity: int) -> None:
        sequence.row, sequence.generation, sequence.capacity = row, generation, capacity
        usable = usable_computed(self._world.tables, row, sequence.log.computed)
        sequence.computed = min(usable, sequence.log.known)

    def _copy(self, sequence: Running, start: int, copy: PageCopy) -> None:
        """Slot by slot, then one store that makes them count."""
        if self._still_holds(copy):
            self._copy_slots(sequence, start, copy)
            self._store()
            sequence.log.set_progress(start + copy.tokens, sequence.log.known)
            sequence.computed = start + copy.tokens
            self.copied_tokens += copy.tokens

    def _still_holds(self, copy: PageCopy) -> bool:
        word = int(self._world.tables.page_word[copy.page])
        return generation_of(word) == copy.generation and state_of(word) != PageState.FREE

    def _copy_slots(self, sequence: Running, start: int, copy: PageCopy) -> None:
        for place in range(copy.tokens):
            self._store()
            self._write(sequence, start + place, int(self._world.pool.vectors[copy.page, place]))

    # --- a step of one sequence ---

    def run(self, sequence: Running, most: int) -> None:
        """run, commit: `most` positions, as far as its pages reach."""
        truth, log = sequence.truth, sequence.log
        known = log.known
        computed = min(sequence.computed + most, known, sequence.capacity)
        # Nothing new to compute: the last position runs again for its logits, and writes nothing.
        self._world.pool.check_row(truth, self._world.tables.row_entry[sequence.row], sequence.computed)
        for position in range(sequence.computed, computed):
            self._store()
            self._write(sequence, position, truth.vectors[position])
        if computed == known:
            self._store()
            log.tokens[known] = next_token(truth.vectors[known - 1], truth.index, 0, SHAPE)
            known += 1
        self._store()
        log.set_progress(computed, known)
        sequence.computed = computed
        if known == log.capacity:
            self._end(sequence, Reason.LENGTH)
            self._close(sequence)

    def _write(self, sequence: Running, position: int, vector: Vector) -> None:
        word = int(self._world.tables.row_entry[sequence.row, position // PAGE_SIZE])
        self._world.pool.write(word, position % PAGE_SIZE, vector, sequence.generation)

    def _end(self, sequence: Running, reason: Reason) -> None:
        self._store()
        sequence.log.set_terminal(reason, sequence.log.known - sequence.log.prompt_length)
        self.unfinished.remove(sequence)

    # --- giving back ---

    def cancel(self, key: str) -> None:
        for sequence in list(self.unfinished):
            if sequence.key == key:
                self._end(sequence, Reason.CANCELLED)
                if sequence.row >= 0:
                    self._close(sequence)

    def preempt(self, sequence: Running) -> None:
        self._lower(sequence)
        self._close(sequence)

    def _lower(self, sequence: Running) -> None:
        self._store()
        sequence.log.set_progress(0, sequence.log.known)

    def trim(self, sequence: Running) -> None:
        kept = -(-sequence.log.known // PAGE_SIZE) * PAGE_SIZE
        sequence.capacity = min(sequence.capacity, kept)
        self._store()
        self._send([(asking.trim(sequence, kept), _nothing)])

    def _close(self, sequence: Running) -> None:
        self._store()
        self.closed.append((sequence, sequence.row, sequence.generation))
        self._send([(asking.close(sequence, sequence.generation), _nothing)])
        sequence.row, sequence.generation, sequence.capacity, sequence.computed = -1, 0, 0, 0
        for other in self.unfinished:
            other.short = False

    def repeat_old(self) -> None:
        """Calls about a row that is gone: they change nothing."""
        sequence, _, generation = self.closed[-1]
        acts = [asking.close(sequence, generation), asking.trim(sequence, 0, generation)]
        self._send([(act, _nothing) for act in acts])

    def forget(self, key: str) -> None:
        for index in range(len(self._world.records[key].outputs)):
            del self.sequences[key, index]
        self.closed = [old for old in self.closed if old[0].key != key]
        self._world.forget(key)


def _nothing(answer: Answer) -> None:
    if isinstance(answer, Refused):
        raise Violation(f"a call that gives back was refused: {answer}")
