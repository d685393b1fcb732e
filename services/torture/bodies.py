"""The requests that a torture run sends: a fixed set, so that each has one reference."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum
from typing import Final

from pagehold.client import make_request
from pagehold.v1 import inference_pb2 as api

MOST_BODIES: Final = 48


class Trait(Enum):
    """What a body makes the server do, beyond plain decoding."""

    FORK = "fork"  # several outputs
    LONG = "long"  # a prompt of several chunks
    STOP = "stop"  # a stop string that comes up
    SHARED = "shared"  # a prefix that others have too
    SHORT = "short"  # it ends soon
    RANKED = "ranked"  # nothing is sent before its end


@dataclass(frozen=True, slots=True)
class Body:
    """One request without its id."""

    number: int
    message: api.GenerateRequest
    traits: frozenset[Trait]
    is_salted: bool  # computed anew each time: no cached page fits

    def request(self, request_id: str) -> api.GenerateRequest:
        """A copy of the message under this id."""
        message = api.GenerateRequest()
        message.CopyFrom(self.message)
        message.request_id = request_id
        if self.is_salted:
            message.cache_salt = request_id
        return message


def make_bodies(count: int = MOST_BODIES) -> list[Body]:
    """Greedy and seeded in turn, with the options that must survive too. The same ones every time."""
    return [_body(number) for number in range(count)]


def _body(number: int) -> Body:
    draw = random.Random(number)
    traits = {trait for trait, (every, at) in _PLACES.items() if number % every == at}
    text = f"{_OPENINGS[number % len(_OPENINGS)]} (variation {number})"
    if Trait.LONG in traits:
        text = f"{_prose(draw, 480)} {text}"
    elif Trait.SHARED in traits:
        text = f"{_prose(random.Random('shared'), 90)} {text}"
    options: dict[str, object] = {
        "max_tokens": draw.randint(3, 9) if Trait.SHORT in traits else draw.randint(40, 112),
        "ignore_eos": number % 5 != 0,
        "temperature": 0.0 if number % 2 == 0 else 0.9,
        "logprobs": number % 6 == 1,
    }
    if number % 2:
        options |= {"seed": 1000 + number}
        options |= draw.choice([{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}])
    if number % 8 == 3:
        options |= {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    if Trait.STOP in traits:
        # Counts only from here on, so that something is sent before it.
        options |= {"stop": [" the", "."], "min_tokens": draw.randint(10, 40)}
    if Trait.FORK in traits:
        options |= {"n": 4, "max_tokens": draw.randint(30, 60)}
    if Trait.RANKED in traits:
        options |= {"n": 2, "best_of": 3, "max_tokens": draw.randint(20, 40)}
    message = make_request(text, **options)
    return Body(number, message, frozenset(traits), number % 3 == 0 or Trait.LONG in traits)


def _prose(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(_WORDS) for _ in range(words))


# (every, at): which numbers have the trait.
_PLACES: Final = {
    Trait.FORK: (12, 5),
    Trait.LONG: (16, 9),
    Trait.STOP: (8, 6),
    Trait.SHARED: (8, 2),
    Trait.SHORT: (12, 4),
    Trait.RANKED: (24, 19),
}
_OPENINGS: Final = (
    "The old harbour town wakes up when",
    "To mend a broken clock you first",
    "On the far side of the moon there",
    "A queue is a data structure in which",
    "My grandmother always said that",
    "Rivers change their course because",
    "The committee met on Monday to",
    "Long after the last train had gone",
)
_WORDS: Final = tuple(
    "stone river market winter letter engine garden copper window silent yellow travel north paper bridge "
    "harvest signal cotton morning island narrow doctor circle forest planet silver answer hollow".split()
)
