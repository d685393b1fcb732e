"""The engine over a real manager core and real shared files; the model is a rule that checks its pages."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.runtime import failpoint
from tests.unit.executor.checking_runner import expected
from tests.unit.executor.world import World


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "state"


def prompt_of(number: int, length: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(100, 40_000) for _ in range(length)]


def test_one_stream(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 40), 50)
    world.run()
    heard = frontend.stream(1)
    assert heard.accepted == 1
    assert heard.tokens[0] == expected(prompt_of(1, 40), 50)
    assert (heard.ended[0].reason, heard.ended[0].length) == (ex.END_REASON_LENGTH, 50)
    assert world.runner.computed_positions == 40 + 49


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 100])
def test_a_cached_prompt_is_not_computed_again(root: Path, length: int) -> None:
    world = World(root)
    frontend = world.connect()
    prompt = prompt_of(2, length)
    world.submit(frontend, 1, prompt, 20)
    world.run()
    before = world.runner.computed_positions
    world.submit(frontend, 2, prompt, 20)
    world.run()
    assert frontend.stream(2).tokens[0] == frontend.stream(1).tokens[0] == expected(prompt, 20)
    # Also the part of the prompt's last page: the first answer has filled and sealed that page.
    assert frontend.stream(2).ended[0].cached_tokens == length
    assert world.runner.copied_slots == length % 16
    # A full hit runs the last position again for its logits.
    assert world.runner.computed_positions - before == 1 + 19


def test_salts_do_not_share(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    for number, salt in enumerate(("a", "b"), 1):
        world.submit(frontend, number, prompt_of(3, 64), 8, cache_salt=salt)
        world.run()
    assert frontend.stream(2).ended[0].cached_tokens == 0


def test_outputs_of_one_request_share_their_prompt(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    prompt = prompt_of(4, 160)
    world.submit(frontend, 1, prompt, 16, n=4)
    world.run()
    for index in range(4):
        assert frontend.stream(1).tokens[index] == expected(prompt, 16, index=index)
    # The others wait for the first to fill the prompt's pages.
    assert world.runner.computed_positions <= 160 + 4 * 17


@pytest.mark.parametrize("pages", [14, 20, 40])
def test_preemption_changes_no_token(root: Path, pages: int) -> None:
    world = World(root, pages=pages)
    frontend = world.connect()
    for number in range(1, 13):
        world.submit(frontend, number, prompt_of(number, 30 + number), 100)
    world.run(turns=20_000)
    assert world.page_calls.preemptions > 0
    for number in range(1, 13):
        assert frontend.stream(number).tokens[0] == expected(prompt_of(number, 30 + number), 100)
    assert world.manager.core is not None and not world.manager.core.live_rows


def test_without_prefix_cache_preempted_sequences_start_over(root: Path) -> None:
    world = World(root, pages=14)
    world.prefix_cache = False
    world.start_executor()
    frontend = world.connect()
    for number in range(1, 7):
        world.submit(frontend, number, prompt_of(number, 40), 100)
    world.run(turns=20_000)
    for number in range(1, 7):
        assert frontend.stream(number).tokens[0] == expected(prompt_of(number, 40), 100)


def test_too_large_is_refused_at_once(root: Path) -> None:
    world = World(root, pages=10)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 100), 62)
    world.submit(frontend, 2, prompt_of(1, 100), 61)
    world.run()
    assert frontend.stream(1).failures == [ex.FAILURE_TOO_LARGE]
    assert frontend.stream(2).tokens[0] == expected(prompt_of(1, 100), 61)


def test_stop_token_and_min_tokens(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    prompt = prompt_of(5, 20)
    tokens = expected(prompt, 60)
    world.submit(frontend, 1, prompt, 60, stopping={"stop_token_ids": [tokens[9]]})
    world.submit(frontend, 2, prompt, 60, stopping={"stop_token_ids": [tokens[9]], "min_tokens": 11})
    world.run()
    assert frontend.stream(1).tokens[0] == tokens[:10]
    assert (frontend.stream(1).ended[0].reason, frontend.stream(1).ended[0].length) == (ex.END_REASON_STOP, 10)
    assert frontend.stream(2).tokens[0] == tokens


@pytest.mark.parametrize("seed", range(8))
def test_killed_anywhere_the_successor_goes_on(root: Path, seed: int) -> None:
    """Executors die at random failpoints and managers between turns; the frontend attaches again each time."""
    rng = random.Random(seed)
    world = World(root, pages=rng.choice([30, 60, 200]))
    world.lose_replies = rng.random() < 0.5
    names = [
        f"executor.{step}"
        for step in (
            "ensure.before",
            "run.before",
            "run.after",
            "commit.before",
            "commit.after",
            "finish.before",
            "finish.after",
            "publish.after",
        )
    ]
    lengths = {number: rng.randint(1, 120) for number in range(1, 9)}
    frontend = world.connect()
    for number, length in lengths.items():
        world.submit(frontend, number, prompt_of(number, length), 80)
    heard: dict[int, list[int]] = {number: [] for number in lengths}
    accepted: set[int] = set()
    deaths = 0
    for _ in range(40):
        failpoint.arm(f"{rng.choice(names) if deaths else names[4]}=error@{rng.randint(1, 20)}")
        died = False
        try:
            world.run(turns=20_000)
        except failpoint.FailpointError:
            died = True
            deaths += 1
        finally:
            failpoint.arm("")
        for number in lengths:
            stream = frontend.stream(number)
            heard[number] += stream.tokens.get(0, [])
            if stream.accepted:
                accepted.add(number)
        if not died:
            break
        if rng.random() < 0.4:
            world.manager = world._new_manager()
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
    assert deaths > 0
    for number, length in lengths.items():
        assert heard[number] == expected(prompt_of(number, length), 80), f"stream {number}, seed {seed}"
        assert frontend.stream(number).ended[0].length == 80


def test_a_kill_costs_no_prefill(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    for number in range(1, 9):
        world.submit(frontend, number, prompt_of(number, 100), 64)
    while len(frontend.stream(8).tokens.get(0, [])) < 20:
        world.turn()
    world.start_executor()
    frontend = world.connect()
    for number in range(1, 9):
        world.send(frontend, attach=ex.Attach(stream_id=number, tenant="default", request_id=f"r{number}"))
    world.run()
    for number in range(1, 9):
        assert frontend.stream(number).tokens[0] == expected(prompt_of(number, 100), 64)
    assert world.engine.prefill_tokens == 0


def test_steps_are_counted_with_their_sequences_and_seconds(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    for number in (1, 2, 3):
        world.submit(frontend, number, prompt_of(number, 20), 30)
    world.run()
    engine = world.engine
    assert engine.steps == world.runner.steps >= 30
    assert engine.step_sequences == engine.decode_tokens + 3, "one for each token: each prompt is one chunk"
    assert engine.step_seconds > 0


def test_resume_describes_and_checks_offsets(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 30)
    world.run()
    other = world.connect()
    for stream_id, name, offset in ((5, "r1", 12), (6, "r1", 31), (7, "nobody", 0)):
        attach = ex.Attach(stream_id=stream_id, tenant="default", request_id=name, describe=True)
        attach.positions.add(index=0, offset=offset)
        world.send(other, attach=attach)
    world.run()
    assert other.stream(5).records[0].prompt_tokens == 20
    assert other.stream(5).tokens[0] == expected(prompt_of(1, 20), 30)
    assert other.stream(5).ended[0].length == 30
    assert other.stream(6).failures == [ex.FAILURE_OUT_OF_RANGE]
    assert other.stream(7).failures == [ex.FAILURE_NOT_FOUND]


def test_same_id_attaches_or_is_refused(root: Path) -> None:
    world = World(root)
    first, second = world.connect(), world.connect()
    world.submit(first, 1, prompt_of(1, 20), 30, name="same")
    while not first.stream(1).tokens:
        world.turn()
    world.submit(second, 2, prompt_of(1, 20), 30, name="same")
    world.turn()
    other_body = ex.Submit(stream_id=3, tenant="default", digest=b"x", prompt=[5], max_tokens=3)
    from pagehold.v1 import inference_pb2 as api

    other_body.request = api.GenerateRequest(request_id="same").SerializeToString()
    world.send(second, submit=other_body)
    world.run()
    assert first.stream(1).failures == [ex.FAILURE_TAKEN_OVER]
    assert second.stream(2).tokens[0] == expected(prompt_of(1, 20), 30)
    assert second.stream(3).failures == [ex.FAILURE_ALREADY_EXISTS]


def test_stop_at_ends_an_output_and_is_kept(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 400)
    while len(frontend.stream(1).tokens.get(0, [])) < 12:
        world.turn()
    world.send(frontend, stop_at=ex.StopAt(tenant="default", request_id="r1", index=0, length=10))
    world.run()
    assert (frontend.stream(1).ended[0].reason, frontend.stream(1).ended[0].length) == (ex.END_REASON_STOP, 10)
    other = world.connect()
    world.send(other, attach=ex.Attach(stream_id=2, tenant="default", request_id="r1"))
    world.run()
    assert other.stream(2).tokens[0] == expected(prompt_of(1, 20), 10)


def test_detached_output_parks_and_goes_on(root: Path) -> None:
    world = World(root, park_after=32)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 200)
    while not frontend.stream(1).tokens:
        world.turn()
    world.disconnect(frontend)
    world.run()
    log = world.requests.sequence(next(iter(world.requests.live)), 0)
    assert log is not None and 32 <= log.length < 64
    other = world.connect()
    world.send(other, attach=ex.Attach(stream_id=2, tenant="default", request_id="r1"))
    world.run()
    assert other.stream(2).tokens[0] == expected(prompt_of(1, 20), 200)


def test_an_adopted_output_does_not_rest_before_its_frontend_is_back(root: Path) -> None:
    """How far it was read is not known to a new executor: the first step must not be without it."""
    world = World(root, park_after=32)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 200)
    while len(frontend.stream(1).tokens.get(0, [])) < 100:
        world.turn()
    world.start_executor()
    world.turn()
    sequence = world.sequence(1)
    assert sequence.length > 100 and not world.engine.scheduler.parked(sequence)
    world.run()
    assert 132 <= sequence.length < 164, "nobody came: it rests then"


def test_who_comes_back_has_what_is_there_before_the_next_step(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 200)
    while len(frontend.stream(1).tokens.get(0, [])) < 10:
        world.turn()
    known = world.sequence(1).length
    other = world.connect()
    world.send(other, attach=ex.Attach(stream_id=2, tenant="default", request_id="r1"))
    world.engine.handle(world.inbox.take(0))
    assert other.stream(2).tokens[0] == expected(prompt_of(1, 20), 200)[:known]


def test_detach_without_grace_cancels(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 900)
    while not frontend.stream(1).tokens:
        world.turn()
    world.send(frontend, detach=ex.Detach(stream_id=1, grace_ms=0))
    for _ in range(2000):
        world.turn()
        if not world.requests.live:
            break
    assert not world.requests.live
    assert world.manager.core is not None and not world.manager.core.live_rows


def test_a_slow_frontend_holds_up_nobody(root: Path) -> None:
    world = World(root)
    slow, fast = world.connect(), world.connect()
    slow.reading = False
    world.submit(slow, 1, prompt_of(1, 20), 60)
    world.submit(fast, 2, prompt_of(2, 20), 60)
    world.run()
    assert fast.stream(2).tokens[0] == expected(prompt_of(2, 20), 60)
    assert not slow.heard
    slow.reading = True
    world.run()
    assert slow.stream(1).tokens[0] == expected(prompt_of(1, 20), 60)
