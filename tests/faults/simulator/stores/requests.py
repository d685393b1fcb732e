"""The requests of a schedule at the level of stores: few tokens, so that many prefixes meet."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvmanager.keys import request_key
from kvmanager.pins import Pin
from kvmanager.prefix import root_hash
from tests.faults.simulator.model import Shape, Truth, first_vector

PAGE_SIZE = 4
SHAPE = Shape(PAGE_SIZE, vocabulary=3)
_TENANT = "tenant"
_LONGEST = 14  # tokens of a prompt
_TEXTS = 2


@dataclass(frozen=True, slots=True)
class Planned:
    """A request before it comes."""

    truth: Truth
    pin: Pin | None

    @property
    def capacity(self) -> int:
        """Tokens of each output, prompt included."""
        return len(self.truth.outputs[0].tokens)


def plan_requests(rng: random.Random, count: int) -> list[Planned]:
    """Prompts cut from two texts, now and then with another end; two salts; one to three outputs; two names of pins."""
    texts = [[rng.randrange(SHAPE.vocabulary) for _ in range(_LONGEST)] for _ in range(_TEXTS)]
    return [_plan(rng, number, texts) for number in range(count)]


def _plan(rng: random.Random, number: int, texts: list[list[int]]) -> Planned:
    prompt = rng.choice(texts)[: rng.randint(1, _LONGEST)]
    if rng.random() < 0.3:
        prompt = [*prompt[:-1], rng.randrange(SHAPE.vocabulary)]
    root = root_hash("model", _TENANT, rng.choice(("", "", "salt")))
    key, outputs = request_key(_TENANT, f"request {number}"), rng.choice((1, 1, 1, 2, 3))
    truth = Truth.of(key, root, prompt, rng.randint(1, 7), outputs, SHAPE, first_vector(root))
    pin = Pin(_TENANT, rng.choice(("one", "two"))) if rng.random() < 0.2 else None
    return Planned(truth, pin)
