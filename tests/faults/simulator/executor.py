"""A scripted executor: the order of its stores is the product's, its arithmetic is the model's."""

from __future__ import annotations

from dataclasses import dataclass

from kvmanager.core import Granted
from kvmanager.errors import Refusal, Refused
from kvmanager.layout import OutputLog, Reason, RowState, generation_of, state_of, usable_computed, words_key
from tests.faults.simulator.faults import Countdown, ExecutorKilled
from tests.faults.simulator.model import PAGE_SIZE, Truth, next_token
from tests.faults.simulator.world import Violation, World


@dataclass(slots=True)
class Running:
    """A sequence, as far as its executor knows."""

    truth: Truth
    log: OutputLog
    computed: int = 0
    row: int = -1
    generation: int = 0
    capacity: int = 0


class Executor:
    """Dies before a planned one of its own stores; all it knows is made again from the shared bytes."""

    def __init__(self, world: World, number: int, stores: Countdown) -> None:
        self._world = world
        self._stores = stores
        self.sequences: dict[str, Running] = {}
        identity = number.to_bytes(16, "little")
        before = world.core.epoch
        epoch = world.call(lambda core: core.attach(identity))
        if epoch <= before and number > 1:
            raise Violation("a new executor was given an old epoch")
        for key in list(world.records):
            self.load(key)
        tables = world.tables
        for row, word in enumerate(tables.row_word.tolist()):
            if state_of(word) == RowState.LIVE:
                sequence = self.sequences[words_key(tables.row_key[row])]
                capacity = int(tables.row_length[row]) * PAGE_SIZE
                self._bind(sequence, Granted(row, generation_of(word), capacity, 0))
                if sequence.log.ended:
                    self._close(sequence)

    def load(self, key: str) -> None:
        log = self._world.records[key].outputs[0]
        if log.known == log.capacity and not log.ended:
            self._end(log)  # a death between the last token and its terminal word
        self.sequences[key] = Running(self._world.truths[key], log)

    @property
    def unfinished(self) -> list[Running]:
        return [sequence for sequence in self.sequences.values() if not sequence.log.ended]

    def _store(self) -> None:
        if self._stores.due():
            raise ExecutorKilled

    # --- one turn of one sequence ---

    def advance(self, sequence: Running, most: int, headroom: int) -> bool:
        """schedule, ensure, run, commit for one sequence; False when it got no pages."""
        limit = max(sequence.log.capacity - 1, sequence.log.prompt_length)
        if sequence.capacity < sequence.log.known:
            need = min(sequence.log.known + 1, limit)
            try:
                granted = self._ensure(sequence, need, min(headroom, limit - need))
            except Refused as refused:
                if refused.reason in (Refusal.NO_PAGES, Refusal.NO_ROWS):
                    return False
                raise
            if sequence.row < 0:
                self._bind(sequence, granted)
            sequence.capacity = granted.capacity
            if granted.capacity < need:
                raise Violation("granted less than the need")
        self._run(sequence, most)
        return True

    def _ensure(self, sequence: Running, need: int, headroom: int) -> Granted:
        key, generation = sequence.truth.key, sequence.generation
        return self._world.call(lambda core: core.ensure(key, 0, generation, need, headroom, 0))

    def _bind(self, sequence: Running, granted: Granted) -> None:
        sequence.row, sequence.generation, sequence.capacity = granted.row, granted.generation, granted.capacity
        usable = usable_computed(self._world.tables, granted.row, sequence.log.computed)
        sequence.computed = min(usable, sequence.log.known)

    def _run(self, sequence: Running, most: int) -> None:
        truth, known = sequence.truth, sequence.log.known
        computed = min(sequence.computed + most, known)
        # Nothing new to compute: the last position runs again for its logits, and writes nothing.
        self._world.check_row(truth.key, sequence.row, sequence.computed)
        for position in range(sequence.computed, computed):
            self._store()
            self._world.write(sequence.row, sequence.generation, position, truth.vectors[position])
        if computed == known:
            self._store()
            sequence.log.tokens[known] = next_token(truth.vectors[known - 1])
            known += 1
        self._store()
        sequence.log.set_progress(computed, known)
        sequence.computed = computed
        if known == sequence.log.capacity:
            self._end(sequence.log)
            self._close(sequence)

    def _end(self, log: OutputLog) -> None:
        self._store()
        log.set_terminal(Reason.LENGTH, log.known - log.prompt_length)

    # --- giving back ---

    def preempt(self, sequence: Running) -> None:
        self._store()
        sequence.log.set_progress(0, sequence.log.known)
        self._close(sequence)

    def trim(self, sequence: Running) -> None:
        key, generation = sequence.truth.key, sequence.generation
        kept = -(-sequence.log.known // PAGE_SIZE) * PAGE_SIZE
        sequence.capacity = min(sequence.capacity, kept)
        self._store()
        self._world.call(lambda core: core.trim(key, 0, generation, kept))

    def _close(self, sequence: Running) -> None:
        key, generation = sequence.truth.key, sequence.generation
        self._store()
        self._world.call(lambda core: core.close(key, 0, generation))
        sequence.row, sequence.generation, sequence.capacity, sequence.computed = -1, 0, 0, 0

    def with_row(self) -> list[Running]:
        return [sequence for sequence in self.sequences.values() if sequence.row >= 0]
