"""Planted faults of what processes say to each other: each must end in a Violation that names it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvmanager.layout import Reason
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.v1 import inference_pb2 as api
from services.executor import engine, grants
from services.executor.engine import Engine
from services.executor.kv_link import KvLink
from services.executor.publisher import Connection
from services.executor.runner.base import Chunk, StepResult
from services.executor.scheduler import Plan, Scheduler
from services.executor.sequence import Phase, Sequence
from services.frontend.clientstream import ClientStream
from services.frontend.link import ExecutorLink
from tests.faults.simulator.faults import Violation
from tests.faults.simulator.messages.components import Executor
from tests.faults.simulator.messages.runner import ModelRunner, Step
from tests.faults.simulator.messages.schedule import Schedule, run
from tests.faults.simulator.messages.seams import DyingOutput

Patch = pytest.MonkeyPatch

_SEEDS = 200


def published_before_committed(patch: Patch) -> None:
    """The progress word of an output that goes on is stored only when the step's tokens are on their way."""
    late: dict[DyingOutput, tuple[int, int]] = {}
    real_progress, real_terminal = DyingOutput.set_progress, DyingOutput.set_terminal
    real_commit, real_step = Engine._commit, Engine.step
    committing = False

    def commit(self: Engine, *arguments: object) -> None:
        nonlocal committing
        committing = True
        try:
            real_commit(self, *arguments)  # type: ignore[arg-type]
        finally:
            committing = False

    def step(self: Engine) -> bool:
        late.clear()
        busy = real_step(self)
        for output, progress in late.items():
            real_progress(output, *progress)
        return busy

    def set_progress(self: DyingOutput, computed: int, known: int) -> None:
        if committing:
            late[self] = computed, known
        else:
            real_progress(self, computed, known)

    def set_terminal(self: DyingOutput, reason: Reason, length: int) -> None:
        if self in late:
            real_progress(self, *late.pop(self))
        real_terminal(self, reason, length)

    patch.setattr(DyingOutput, "set_progress", set_progress)
    patch.setattr(DyingOutput, "set_terminal", set_terminal)
    patch.setattr(Engine, "_commit", commit)
    patch.setattr(Engine, "step", step)


def successor_without_an_epoch(patch: Patch) -> None:
    """Every executor attaches under the id of the first."""
    real = Executor.__init__

    def init(self: Executor, network: object, process: object, state: object, number: int, *rest: object) -> None:
        real(self, network, process, state, 1, *rest)  # type: ignore[arg-type]

    patch.setattr(Executor, "__init__", init)


def resumed_one_token_too_far(patch: Patch) -> None:
    real = ClientStream.begin

    def begin(self: ClientStream, message: api.GenerateRequest) -> None:
        real(self, message)
        for output in self.outputs:
            output.wanted_from += bool(self.positions)

    patch.setattr(ClientStream, "begin", begin)


def resumed_one_token_too_early(patch: Patch) -> None:
    real = ClientStream.begin

    def begin(self: ClientStream, message: api.GenerateRequest) -> None:
        real(self, message)
        for output in self.outputs:
            output.wanted_from = max(output.wanted_from - 1, 0)

    patch.setattr(ClientStream, "begin", begin)


def tokens_of_another_stream(patch: Patch) -> None:
    """Two streams of one message are taken for each other."""
    real = ExecutorLink._dispatch_tokens

    async def dispatch(self: ExecutorLink, run: ex.StepTokens) -> None:
        run.stream_ids[:] = [*run.stream_ids[1:], *run.stream_ids[:1]]
        await real(self, run)

    patch.setattr(ExecutorLink, "_dispatch_tokens", dispatch)


def calls_that_are_not_repeated(patch: Patch) -> None:
    """What was sent on a stream that broke counts as answered."""
    real = KvLink._session

    def session(self: KvLink, stub: object) -> object:
        while len(self._unanswered) > self._unsent:
            self._unanswered.popleft()
        return real(self, stub)  # type: ignore[arg-type]

    patch.setattr(KvLink, "_session", session)


def end_before_the_last_tokens(patch: Patch) -> None:
    """An output that has ended is not told of the tokens that its stream has not seen."""
    real = Connection.offer

    def offer(self: Connection, message: ex.ConnectResponse) -> None:
        if message.ended:
            message.ClearField("tokens")
        real(self, message)

    patch.setattr(Connection, "offer", offer)


def computed_raised_before_the_copy(patch: Patch) -> None:
    real = grants._copy

    def copy(sequence: object, grant: grants.Grant, pool: object, runner: object) -> int:
        if grant.copy is not None and sequence.computed == grant.shared:  # type: ignore[attr-defined]
            count = min(grant.copy.tokens, sequence.known - grant.shared)  # type: ignore[attr-defined]
            sequence.log.set_progress(grant.shared + count, sequence.known)  # type: ignore[attr-defined]
        return real(sequence, grant, pool, runner)  # type: ignore[arg-type]

    patch.setattr(grants, "_copy", copy)


def row_given_back_under_a_step(patch: Patch) -> None:
    """A `close` does not wait for the step that is under way."""
    patch.setattr(engine, "_TAKE_PAGES", ())


def result_of_a_lost_row_is_committed(patch: Patch) -> None:
    """A step that was under way when its sequence lost its row raises `computed` all the same."""
    real = Engine._commit

    def commit(self: Engine, plan: Plan, result: StepResult) -> None:
        lost = [sequence for sequence in plan.sequences if sequence.row < 0 and sequence.phase is Phase.WAITING]
        for sequence in lost:
            sequence.row = 0
        real(self, plan, result)
        for sequence in lost:
            sequence.row = -1

    patch.setattr(Engine, "_commit", commit)


def wrong_draft_is_kept(patch: Patch) -> None:
    """One more than was right, where there is one."""
    real = ModelRunner._compute

    def compute(self: ModelRunner, step: Step) -> StepResult:
        result = real(self, step)
        if result.drafts is not None:
            np.minimum(result.drafts.right + 1, result.drafts.tried, out=result.drafts.right)
        return result

    patch.setattr(ModelRunner, "_compute", compute)


def drafts_beyond_the_row(patch: Patch) -> None:
    """As many as the sequence may come to need, whatever its row holds."""
    real = Scheduler._draft

    def draft(self: Scheduler, decodes: list[Sequence], chunks: list[Chunk]) -> int:
        held = [sequence.capacity for sequence in decodes]
        for sequence in decodes:
            sequence.capacity = sequence.limit
        wanted = real(self, decodes, chunks)
        for sequence, capacity in zip(decodes, held, strict=True):
            sequence.capacity = capacity
        return wanted

    patch.setattr(Scheduler, "_draft", draft)


MUTANTS: tuple[Callable[[Patch], None], ...] = (
    published_before_committed,
    successor_without_an_epoch,
    resumed_one_token_too_far,
    resumed_one_token_too_early,
    tokens_of_another_stream,
    calls_that_are_not_repeated,
    end_before_the_last_tokens,
    computed_raised_before_the_copy,
    row_given_back_under_a_step,
    result_of_a_lost_row_is_committed,
    wrong_draft_is_kept,
    drafts_beyond_the_row,
)


def play_all() -> None:
    for seed in range(_SEEDS):
        run(Schedule(seed, requests=4, deaths=8, faults=3))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_planted_fault_is_found(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    with pytest.raises(Violation) as found:
        play_all()
    # Not by crashing over it, but by an invariant that names it.
    assert ": Violation: " in str(found.value), found.value
    print(str(found.value).split(": Violation: ")[1])
