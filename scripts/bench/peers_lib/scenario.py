"""The loads that are compared: how many requests at once, how long their prompts are, how much each generates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from peers_lib.requestfile import Request, draw


@dataclass(frozen=True, slots=True)
class Scenario:
    """All requests arrive at the same moment."""

    name: str
    requests: int
    prompt: tuple[int, int]  # shortest and longest, in tokens
    max_tokens: int

    @property
    def title(self) -> str:
        shortest, longest = self.prompt
        length = str(shortest) if shortest == longest else f"{shortest}-{longest}"
        noun = "request" if self.requests == 1 else "requests at once"
        return f"{self.requests} {noun}, prompts of {length} tokens, {self.max_tokens} new tokens each"

    def draw(self, seed: int) -> list[Request]:
        """The scenario's requests; its name is part of the seed, so no two scenarios share a prompt."""
        salt = int.from_bytes(self.name.encode(), "big")
        return draw(seed ^ salt, self.requests, self.prompt, self.max_tokens, prefix=self.name)


SCENARIOS: Final = (
    Scenario("one", 1, (64, 64), 128),
    Scenario("eight", 8, (64, 64), 128),
    Scenario("thirty-two", 32, (64, 512), 128),
    Scenario("sixty-four", 64, (64, 512), 128),
)
QUICK: Final = (Scenario("quick-one", 1, (32, 32), 16), Scenario("quick-eight", 8, (16, 64), 16))
# Touches every shape once: first calls of an engine allocate and tune.
WARM_UP: Final = Scenario("warm-up", 4, (48, 96), 8)


def choose(name: str, *, quick: bool) -> tuple[Scenario, ...]:
    """`all`, or names parted by commas. Raises ValueError for a name that is none."""
    offered = QUICK if quick else SCENARIOS
    if name == "all":
        return offered
    named = {scenario.name: scenario for scenario in offered}
    wanted = [part.strip() for part in name.split(",")]
    unknown = [part for part in wanted if part not in named]
    if unknown:
        raise ValueError(f"no scenario {', '.join(unknown)!r}: there are all, {', '.join(named)}")
    return tuple(named[part] for part in wanted)
