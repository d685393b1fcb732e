"""Drafts change no token: not where some are right and some are wrong, and not at any border."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.runtime import failpoint
from services.executor.runner.base import DraftLimits
from tests.unit.executor.checking_runner import expected, logprob
from tests.unit.executor.world import World

LIMITS = DraftLimits(each=15, rows=32)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "state"


def prompt_of(number: int, length: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(100, 40_000) for _ in range(length)]


@pytest.mark.parametrize("accuracy", [0.0, 0.9])
def test_many_streams_have_the_drafts_that_each_was_granted(root: Path, accuracy: float) -> None:
    world = World(root, drafts=LIMITS._replace(rows=8, granted=64))
    world.runner.accuracy = accuracy
    frontend = world.connect()
    for number in range(6):
        world.submit(frontend, number, prompt_of(number, 40), 200)
    world.run()
    for number in range(6):
        assert frontend.stream(number).tokens[0] == expected(prompt_of(number, 40), 200)
    engine = world.engine
    if accuracy:
        assert 0.6 * engine.draft_tokens < engine.accepted_tokens < engine.draft_tokens
        assert world.runner.steps < 150
    else:
        assert engine.accepted_tokens == 0
        assert engine.draft_tokens <= 6 * 6, "few of 200 tokens each"


def test_one_stream_takes_fewer_steps(root: Path) -> None:
    world = World(root, drafts=LIMITS)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 40), 200)
    world.run()
    heard, engine = frontend.stream(1), world.engine
    assert heard.tokens[0] == expected(prompt_of(1, 40), 200)
    assert (heard.ended[0].reason, heard.ended[0].length) == (ex.END_REASON_LENGTH, 200)
    assert 0 < engine.accepted_tokens < engine.draft_tokens
    assert world.runner.steps == 200 - engine.accepted_tokens < 100
    # What was computed is the prompt, what was sampled after, and the drafts that were wrong.
    assert world.runner.computed_positions == 40 + 199 + engine.draft_tokens - engine.accepted_tokens
    assert (engine.prefill_tokens, engine.decode_tokens) == (40, 199)


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_drafts_that_are_always_wrong_or_always_right(root: Path, accuracy: float) -> None:
    world = World(root, drafts=LIMITS)
    world.runner.accuracy = accuracy
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 40), 400)
    world.run()
    assert frontend.stream(1).tokens[0] == expected(prompt_of(1, 40), 400)
    if accuracy:
        assert world.engine.accepted_tokens == world.engine.draft_tokens
        assert world.runner.steps < 400 / 10, "most steps give sixteen tokens"
    else:
        assert world.engine.accepted_tokens == 0 and world.runner.steps == 400
        begun = 15 + 7 + 3  # half as many each time
        assert world.engine.draft_tokens < begun + 10, "they rest for longer and longer"


@pytest.mark.parametrize("tokens", range(1, 24))
def test_the_last_token_is_the_last(root: Path, tokens: int) -> None:
    """No draft is put where the log, or what the sequence may come to need, ends."""
    world = World(root, drafts=LIMITS)
    world.runner.accuracy = 1.0
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 16), tokens)
    world.run()
    assert frontend.stream(1).tokens[0] == expected(prompt_of(1, 16), tokens)
    assert world.runner.computed_positions == 16 + tokens - 1


@pytest.mark.parametrize("accuracy", [0.8, 1.0])
@pytest.mark.parametrize("stop", range(1, 40))
def test_a_stop_token_among_drafts(root: Path, stop: int, accuracy: float) -> None:
    """What was right behind it is not the output's; before `min_tokens` it ends nothing."""
    world = World(root, drafts=LIMITS)
    world.runner.accuracy = accuracy
    frontend = world.connect()
    tokens = expected(prompt_of(5, 20), 60)
    assert len(set(tokens)) == len(tokens)
    stopping = {"stop_token_ids": [tokens[stop - 1]]}
    world.submit(frontend, 1, prompt_of(5, 20), 60, stopping=stopping)
    world.submit(frontend, 2, prompt_of(5, 20), 60, stopping=stopping | {"min_tokens": stop + 1})
    world.run()
    assert frontend.stream(1).tokens[0] == tokens[:stop]
    assert (frontend.stream(1).ended[0].reason, frontend.stream(1).ended[0].length) == (ex.END_REASON_STOP, stop)
    assert frontend.stream(2).tokens[0] == tokens


STOP = expected(prompt_of(5, 20), 30)[29]


def test_log_probabilities(root: Path) -> None:
    """Of several sequences in a step, some of whose drafts are wrong; and one that ends on a draft."""
    world = World(root, drafts=LIMITS)
    frontend = world.connect()
    for number in range(1, 5):
        world.submit(frontend, number, prompt_of(number, 20), 60 + number, response={"logprobs": number != 2})
    world.submit(frontend, 5, prompt_of(5, 20), 60, response={"logprobs": True}, stopping={"stop_token_ids": [STOP]})
    world.run()
    assert 0 < world.engine.accepted_tokens < world.engine.draft_tokens
    for number in (1, 3, 4, 5):
        heard = frontend.stream(number)
        assert heard.logprobs[0] == [logprob(token) for token in heard.tokens[0]]
    assert set(frontend.stream(2).logprobs[0]) == {0.0}
    assert frontend.stream(5).tokens[0][-1] == STOP


def test_outputs_of_one_request(root: Path) -> None:
    world = World(root, drafts=LIMITS)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(4, 70), 90, n=4)
    world.run()
    for index in range(4):
        assert frontend.stream(1).tokens[index] == expected(prompt_of(4, 70), 90, index=index)
    assert world.engine.accepted_tokens > 0


def test_a_full_prefix_hit(root: Path) -> None:
    """The last position runs again, its write masked; the drafts behind it are written."""
    world = World(root, drafts=LIMITS)
    world.runner.accuracy = 1.0
    frontend = world.connect()
    for number in (1, 2):
        world.submit(frontend, number, prompt_of(2, 32), 50)
        world.run()
        assert frontend.stream(number).tokens[0] == expected(prompt_of(2, 32), 50)
    assert frontend.stream(2).ended[0].cached_tokens == 32


@pytest.mark.parametrize("pages", [14, 20, 40])
def test_preemption(root: Path, pages: int) -> None:
    world = World(root, pages=pages, drafts=LIMITS)
    frontend = world.connect()
    for number in range(1, 13):
        world.submit(frontend, number, prompt_of(number, 30 + number), 100)
    world.run(turns=20_000)
    assert world.page_calls.preemptions > 0 and world.engine.accepted_tokens > 0
    for number in range(1, 13):
        assert frontend.stream(number).tokens[0] == expected(prompt_of(number, 30 + number), 100)
    assert world.manager.core is not None and not world.manager.core.live_rows


def test_a_row_that_does_not_grow(root: Path) -> None:
    """While the manager is away drafts stop at the row's end, as decoding does."""
    world = World(root, drafts=LIMITS)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 200)
    while not frontend.stream(1).tokens:
        world.turn()
    world.away = True
    world.run()
    sequence = world.sequence(1)
    assert sequence.known == sequence.capacity + 1
    world.answer()
    world.run()
    assert frontend.stream(1).tokens[0] == expected(prompt_of(1, 20), 200)


def test_a_step_stays_within_its_tokens(root: Path) -> None:
    largest: list[int] = []
    limits = LIMITS.within(32)
    world = World(root, drafts=limits, max_batch_tokens=32)
    frontend = world.connect()
    for number in range(1, 13):
        world.submit(frontend, number, prompt_of(number, 40), 60)
    before = 0
    while world.turn() or world.engine.scheduler.running or world.inbox._events:
        largest.append(world.runner.computed_positions - before)
        before = world.runner.computed_positions
    assert world.engine.accepted_tokens > 0 and max(largest) <= 32
    for number in range(1, 13):
        assert frontend.stream(number).tokens[0] == expected(prompt_of(number, 40), 60)


def test_parked_outputs_rest(root: Path) -> None:
    world = World(root, park_after=32, drafts=LIMITS)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 200)
    while not frontend.stream(1).tokens:
        world.turn()
    world.disconnect(frontend)
    world.run()
    assert 32 <= world.sequence(1).length < 64
    other = world.connect()
    world.send(other, attach=ex.Attach(stream_id=2, tenant="default", request_id="r1"))
    world.run()
    assert other.stream(2).tokens[0] == expected(prompt_of(1, 20), 200)


@pytest.mark.parametrize("seed", range(6))
def test_killed_with_drafts_in_flight(root: Path, seed: int) -> None:
    """What lies above `known`, tokens and K/V, is nobody's: the successor overwrites it."""
    rng = random.Random(seed)
    world = World(root, pages=rng.choice([30, 200]), drafts=LIMITS)
    steps = ("run.before", "run.after", "token.after", "commit.before", "commit.after", "finish.before")
    frontend = world.connect()
    lengths = {number: rng.randint(1, 60) for number in range(1, 6)}
    for number, length in lengths.items():
        world.submit(frontend, number, prompt_of(number, length), 80)
    heard: dict[int, list[int]] = {number: [] for number in lengths}
    accepted, right, deaths = set[int](), 0, 0
    for _ in range(40):
        failpoint.arm(f"executor.{rng.choice(steps) if deaths > 1 else steps[2]}=error@{rng.randint(1, 20)}")
        died = False
        try:
            world.run(turns=20_000)
        except failpoint.FailpointError:
            died = True
            deaths += 1
        finally:
            failpoint.arm("")
        right += world.engine.accepted_tokens
        for number in lengths:
            heard[number] += frontend.stream(number).tokens.get(0, [])
            if frontend.stream(number).accepted:
                accepted.add(number)
        if not died:
            break
        world.start_executor()
        frontend = world.connect()
        for number, length in lengths.items():
            if number not in accepted:
                world.submit(frontend, number, prompt_of(number, length), 80)
            else:
                position = [{"index": 0, "offset": len(heard[number])}]
                attach = ex.Attach(stream_id=number, tenant="default", request_id=f"r{number}", positions=position)
                world.send(frontend, attach=attach)
    else:
        pytest.fail("did not finish in 40 lives")
    assert deaths > 1 and right > 0
    for number, length in lengths.items():
        assert heard[number] == expected(prompt_of(number, length), 80), f"stream {number}, seed {seed}"
