"""Request files: the same prompts, token by token, for every engine.

A file is JSON lines: `{"id", "prompt_token_ids", "max_tokens", "ignore_eos", "seed", "at"}`. The contents are a pure
function of the arguments of `draw`, so a scenario's file can be made again from its name.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Final

# Below lie special tokens and single bytes, above the rarest merges.
ORDINARY_TOKENS: Final = range(1000, 40000)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how many tokens are wanted after it."""

    id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    ignore_eos: bool
    seed: int
    at: float = 0.0  # seconds after the scenario's start at which it is sent

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("a request has an empty id")
        if not self.prompt_token_ids or min(self.prompt_token_ids) < 0:
            raise ValueError(f"request {self.id}: prompt_token_ids must be one or more ids, none negative")
        if self.max_tokens < 1:
            raise ValueError(f"request {self.id}: max_tokens must be at least 1")
        if not 0 <= self.at < math.inf:
            raise ValueError(f"request {self.id}: `at` must be 0 or more seconds")


def draw(seed: int, count: int, lengths: tuple[int, int], max_tokens: int, prefix: str = "r") -> list[Request]:
    """`count` requests with prompts of ordinary random tokens, `lengths` = (shortest, longest) of them."""
    shortest, longest = lengths
    if count < 1 or not 1 <= shortest <= longest:
        raise ValueError("want one request or more, and prompt lengths with 1 <= shortest <= longest")
    source = random.Random(seed)
    found = []
    for number in range(count):
        length = source.randint(shortest, longest)
        ids = tuple(source.choices(ORDINARY_TOKENS, k=length))
        found.append(Request(f"{prefix}-{number}", ids, max_tokens, True, source.getrandbits(32)))
    return found


def behind(prefix: Sequence[int], requests: Iterable[Request]) -> list[Request]:
    """The same requests, all prompts with `prefix` in front."""
    return [replace(request, prompt_token_ids=(*prefix, *request.prompt_token_ids)) for request in requests]


def spread(requests: Sequence[Request], seed: int, rate: float) -> list[Request]:
    """The same requests as Poisson arrivals, `rate` a second on average; the first at once."""
    source = random.Random(seed)
    gaps = [0.0, *(source.expovariate(rate) for _ in requests[1:])]
    return [replace(request, at=at) for request, at in zip(requests, accumulate(gaps), strict=True)]


def write(path: Path, requests: Iterable[Request]) -> None:
    path.write_text("".join(json.dumps(asdict(request)) + "\n" for request in requests))


def read(path: Path) -> list[Request]:
    """Raises ValueError, with the line's number, for anything that is not a request."""
    found: list[Request] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            fields = json.loads(line)
            found.append(Request(**{**fields, "prompt_token_ids": tuple(fields["prompt_token_ids"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path.name}:{number}: not a request: {error}") from error
    if not found:
        raise ValueError(f"{path.name}: no requests")
    if len({request.id for request in found}) != len(found):
        raise ValueError(f"{path.name}: two requests have the same id")
    return found
