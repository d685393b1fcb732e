"""Request files: the same prompts, token by token, for every engine.

A file is JSON lines: `{"id", "prompt_token_ids", "max_tokens", "ignore_eos", "seed"}`. The contents are a pure
function of the arguments of `draw`, so a scenario's file can be made again from its name.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
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

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("a request has an empty id")
        if not self.prompt_token_ids or min(self.prompt_token_ids) < 0:
            raise ValueError(f"request {self.id}: prompt_token_ids must be one or more ids, none negative")
        if self.max_tokens < 1:
            raise ValueError(f"request {self.id}: max_tokens must be at least 1")


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
