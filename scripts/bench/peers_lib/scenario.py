"""The loads that are compared: how many requests, when they come, how long their prompts are, what is in them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from peers_lib.prompts import Speak, copies
from peers_lib.requestfile import Request, behind, draw, spread


class Group(StrEnum):
    """What a scenario is about: it decides which tables and plots it is in."""

    BATCH = "batch"  # random prompts, all at once: has a bound
    GROWTH = "growth"  # the same, for one table of step times
    ARRIVALS = "arrivals"
    SHARED = "shared prefix"
    COPY = "copy"


@dataclass(frozen=True, slots=True)
class Scenario:
    """`prompt` counts tokens that are a request's own; of copies it is not used."""

    name: str
    requests: int
    prompt: tuple[int, int]  # shortest and longest, in tokens
    max_tokens: int
    group: Group = Group.BATCH
    prefix: int = 0  # tokens that all prompts begin with
    rate: float = 0.0  # requests a second, as Poisson arrivals; 0: all at the same moment

    @property
    def title(self) -> str:
        noun = "request" if self.requests == 1 else "requests" if self.rate else "requests at once"
        shortest, longest = self.prompt
        length = f"{shortest}" if shortest == longest else f"{shortest}-{longest}"
        prompts = f"prompts of {length} tokens"
        if self.group is Group.COPY:
            prompts = "prompts of text that ask for a copy of it"
        elif self.prefix:
            prompts = f"prompts of {self.prefix} tokens in common and {length} of their own"
        when = f", {self.rate:g} a second on average" if self.rate else ""
        return f"{self.requests} {noun}{when}, {prompts}, {self.max_tokens} new tokens each"

    def draw(self, seed: int, speak: Speak | None = None) -> list[Request]:
        """The scenario's requests; its name is part of the seed, so no two scenarios share a prompt.

        Raises ValueError for copies without `speak`, which makes prompts of text.
        """
        seed ^= int.from_bytes(self.name.encode(), "big")
        if self.group is Group.COPY:
            if speak is None:
                raise ValueError(f"{self.name} needs a model with a tokenizer and a chat template")
            return copies(seed, self.requests, self.max_tokens, self.name, speak)
        found = draw(seed, self.requests, self.prompt, self.max_tokens, prefix=self.name)
        if self.prefix:
            (common,) = draw(seed + 1, 1, (self.prefix, self.prefix), 1)
            found = behind(common.prompt_token_ids, found)
        return spread(found, seed + 2, self.rate) if self.rate else found


def _growth(name: str, counts: tuple[int, ...], max_tokens: int) -> tuple[Scenario, ...]:
    return tuple(Scenario(f"{name}-{count}", count, (16, 16), max_tokens, Group.GROWTH) for count in counts)


SCENARIOS: Final = (
    Scenario("one", 1, (64, 64), 128),
    Scenario("eight", 8, (64, 64), 128),
    Scenario("thirty-two", 32, (64, 512), 128),
    Scenario("sixty-four", 64, (64, 512), 128),
    # Its steps against those of `one`: what a long context costs.
    Scenario("long", 1, (8000, 8000), 128),
    Scenario("arrivals", 32, (64, 512), 128, Group.ARRIVALS, rate=1.0),
    Scenario("shared-prefix", 32, (50, 50), 64, Group.SHARED, prefix=1000),
    Scenario("copy-one", 1, (0, 0), 128, Group.COPY),
    Scenario("copy-eight", 8, (0, 0), 128, Group.COPY),
    # The same without anything to copy.
    Scenario("random-one", 1, (256, 256), 128),
    Scenario("random-eight", 8, (256, 256), 128),
    *_growth("growth", (1, 16, 64, 256, 512), 48),
)
QUICK: Final = (
    Scenario("quick-one", 1, (32, 32), 16),
    Scenario("quick-eight", 8, (16, 64), 16),
    Scenario("quick-long", 1, (600, 600), 16),
    Scenario("quick-arrivals", 3, (16, 32), 8, Group.ARRIVALS, rate=4.0),
    Scenario("quick-shared-prefix", 3, (10, 10), 8, Group.SHARED, prefix=100),
    Scenario("quick-copy", 2, (0, 0), 32, Group.COPY),
    *_growth("quick-growth", (1, 4), 8),
)
# Touches every shape once: first calls of an engine allocate and tune.
WARM_UP: Final = Scenario("warm-up", 4, (48, 96), 8)


def choose(name: str, *, quick: bool) -> tuple[Scenario, ...]:
    """`all`, or names parted by commas; `growth` and the like stand for all that begin so. Raises ValueError."""
    offered = QUICK if quick else SCENARIOS
    if name == "all":
        return offered
    found: list[Scenario] = []
    for part in map(str.strip, name.split(",")):
        matching = [one for one in offered if one.name == part or one.name.startswith(f"{part}-")]
        if not part or not matching:
            raise ValueError(f"no scenario {part!r}: there are all, {', '.join(one.name for one in offered)}")
        found += [one for one in matching if one.name == part] or matching
    return tuple(dict.fromkeys(found))
