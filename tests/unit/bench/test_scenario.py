from __future__ import annotations

import pytest
from peers_lib.scenario import QUICK, SCENARIOS, WARM_UP, Group, Scenario, choose

ALL = [*SCENARIOS, *QUICK, WARM_UP]


def speak(text: str) -> list[int]:
    """A tokenizer that any text goes through."""
    return [1, *text.encode(), 2]


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_requests_follow_from_the_seed(scenario: Scenario) -> None:
    requests = scenario.draw(11, speak)
    assert requests == scenario.draw(11, speak)
    assert requests != scenario.draw(12, speak)
    assert len(requests) == scenario.requests
    assert {request.max_tokens for request in requests} == {scenario.max_tokens}
    if scenario.group is not Group.COPY:
        shortest, longest = (scenario.prefix + length for length in scenario.prompt)
        assert all(shortest <= len(request.prompt_token_ids) <= longest for request in requests)
    times = [request.at for request in requests]
    assert times == sorted(times) and (times[-1] > 0) == bool(scenario.rate)


def test_no_two_scenarios_share_a_prompt() -> None:
    own = [scenario for scenario in SCENARIOS if scenario.group is not Group.COPY]
    prompts = [request.prompt_token_ids[-8:] for scenario in own for request in scenario.draw(11)]
    assert len(set(prompts)) == len(prompts)


def test_a_shared_prefix_is_all_that_is_shared() -> None:
    scenario = Scenario("x", 4, (5, 5), 1, Group.SHARED, prefix=20)
    prompts = [request.prompt_token_ids for request in scenario.draw(11)]
    assert len({prompt[:20] for prompt in prompts}) == 1
    assert len({prompt[20:] for prompt in prompts}) == 4


def test_copies_need_words() -> None:
    with pytest.raises(ValueError, match="needs a model with a tokenizer and a chat template"):
        Scenario("x", 1, (0, 0), 1, Group.COPY).draw(11)


def test_the_default_model_has_room_for_all() -> None:
    for scenario in SCENARIOS:
        assert scenario.prefix + scenario.prompt[1] + scenario.max_tokens <= 8192


def test_titles() -> None:
    titles = {scenario.name: scenario.title for scenario in SCENARIOS}
    assert titles["thirty-two"] == "32 requests at once, prompts of 64-512 tokens, 128 new tokens each"
    assert titles["arrivals"].startswith("32 requests, 1 a second on average, prompts of 64-512 tokens")
    assert "prompts of 1000 tokens in common and 50 of their own" in titles["shared-prefix"]


def test_choosing() -> None:
    assert choose("all", quick=False) == SCENARIOS
    assert choose("all", quick=True) == QUICK
    assert [scenario.name for scenario in choose("eight, one", quick=False)] == ["eight", "one"]
    assert [len(scenario.draw(1)) for scenario in choose("growth", quick=False)] == [1, 16, 64, 256, 512]
    for name in ("one", "", "quick-one,"):
        with pytest.raises(ValueError, match=r"no scenario '\w*': there are all, quick-one"):
            choose(name, quick=True)
