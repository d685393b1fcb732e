from __future__ import annotations

import pytest
from peers_lib.scenario import QUICK, SCENARIOS, WARM_UP, Scenario, choose


@pytest.mark.parametrize("scenario", [*SCENARIOS, *QUICK, WARM_UP], ids=lambda scenario: scenario.name)
def test_requests_follow_from_the_seed(scenario: Scenario) -> None:
    requests = scenario.draw(11)
    assert requests == scenario.draw(11)
    assert len(requests) == scenario.requests
    shortest, longest = scenario.prompt
    assert all(shortest <= len(request.prompt_token_ids) <= longest for request in requests)
    assert {request.max_tokens for request in requests} == {scenario.max_tokens}


def test_no_two_scenarios_share_a_prompt() -> None:
    prompts = [request.prompt_token_ids[:8] for scenario in SCENARIOS for request in scenario.draw(11)]
    assert len(set(prompts)) == len(prompts)


def test_choosing() -> None:
    assert choose("all", quick=False) == SCENARIOS
    assert choose("all", quick=True) == QUICK
    assert [scenario.name for scenario in choose("eight, one", quick=False)] == ["eight", "one"]
    with pytest.raises(ValueError, match=r"no scenario 'one': there are all, quick-one"):
        choose("one", quick=True)
