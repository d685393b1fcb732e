"""A process dies between two steps of its own, each of its lives again, and no stream shows it. An error is a death.

A manager is asked again for all that it has not answered, in one message. So that each life gets further
than the one before, no more calls may be unanswered at a time than a failpoint lets pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pagehold.v1 import inference_pb2 as api
from tests.faults.streams import Answer, Load, generate, prefilled, request
from tests.faults.test_kill import StartStack

pytestmark = pytest.mark.stack


@dataclass(frozen=True)
class Work:
    """What is asked for while processes die."""

    messages: list[api.GenerateRequest]
    at_once: bool

    async def answers(self, address: str, resume: bool = False) -> list[Answer]:
        if self.at_once:
            return await Load(address, self.messages, resume).answers()
        return [(await generate(address, message, resume)).answer for message in self.messages]


# Nothing is copied between them: their first tokens differ.
PROMPTS = tuple(
    f"{keeper} keeps a lighthouse: a tower with a light on its top, built where ships must not go. At dusk the keeper "
    "climbs the stairs, trims the wick, winds the clock that turns the lens, and writes of wind and weather into a "
    "thick book"
    for keeper in ("Anna", "Who", "Everybody", "Nobody")
)
PAGE_SIZE = 16
WORK = {
    "crowd": Work([request(number, tokens=96) for number in range(8)], at_once=True),
    # Of four outputs three are forks of the first one's row, each of which begins with a copy.
    "forks": Work([request(number, 24, text, seeded=True, n=4) for number, text in enumerate(PROMPTS)], at_once=False),
    "long": Work([request(number, tokens=200) for number in range(2)], at_once=True),
}


@pytest.fixture(scope="module")
def quiet() -> dict[str, tuple[list[Answer], int]]:
    """Answers without a fault and the tokens of all their prompts, by work: made once for all borders."""
    return {}


@pytest.mark.parametrize(
    ("work", "failpoint", "hits"),
    [
        ("crowd", "executor.ensure.after", 4),
        ("crowd", "executor.commit.before", 110),
        ("crowd", "kvmanager.page_taken", 4),
        ("crowd", "kvmanager.seal.before_word", 9),
        ("forks", "executor.copy.after", 4),
        ("forks", "kvmanager.fork.after", 5),
        ("long", "kvmanager.ensure_rows.after", 3),
        ("crowd", "frontend.write.before", 60),
    ],
)
async def test_killed_at_a_border(
    start_stack: StartStack, quiet: dict[str, tuple[list[Answer], int]], work: str, failpoint: str, hits: int
) -> None:
    await check(start_stack, quiet, work, failpoint, f"kill@{hits}", "killed by SIGKILL")


@pytest.mark.parametrize(
    ("work", "failpoint", "hits"),
    [
        ("crowd", "executor.token.after", 110),
        ("crowd", "kvmanager.store.before", 60),
    ],
)
async def test_an_error_at_a_border(
    start_stack: StartStack, quiet: dict[str, tuple[list[Answer], int]], work: str, failpoint: str, hits: int
) -> None:
    await check(start_stack, quiet, work, failpoint, f"error@{hits}", f"failpoint {failpoint}: armed with error")


async def check(
    start_stack: StartStack,
    quiet: dict[str, tuple[list[Answer], int]],
    work: str,
    failpoint: str,
    action: str,
    said: str,
) -> None:
    """said: what the log has of each death."""
    if work not in quiet:
        stack = start_stack(prefix_cache=False)  # so that each prompt is computed, once
        quiet[work] = await WORK[work].answers(stack.address), prefilled(stack.address)
        stack.stop()
    answers, tokens = quiet[work]
    # Every process that passes there dies at that hit: several deaths in one run.
    stack = start_stack(environment={"PAGEHOLD_FAILPOINTS": f"{failpoint}={action}"})
    assert await WORK[work].answers(stack.address, resume=failpoint.startswith("frontend.")) == answers
    # While a frontend is away the others go on, so the next one may have too little to do to come by as often.
    assert stack.log.read_text().count(said) >= (1 if failpoint.startswith("frontend.") else 2)
    if not failpoint.startswith("executor."):
        assert prefilled(stack.address) <= tokens, "a prompt was computed twice"
    else:
        # By the last executor. A fork that died with its copy computes less than a page; its prompt is three.
        assert prefilled(stack.address) <= (3 * (PAGE_SIZE - 1) if work == "forks" else 0)
