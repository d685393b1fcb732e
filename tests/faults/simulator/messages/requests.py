"""The requests of a schedule at the level of messages, and what their clients do."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum, auto
from statistics import fmean

from kvmanager.keys import request_key
from kvmanager.prefix import root_hash
from pagehold.v1 import inference_pb2 as api
from tests.faults.simulator.model import OutputTruth, Shape, Truth

FINGERPRINT = "ab" * 32
TENANT = "default"
SHAPE = Shape(page_size=4, vocabulary=18, first_token=10)
MAX_MODEL_LEN = 32
_LONGEST = 14  # tokens of a prompt
_TEXTS = 2


def logprob(token: int) -> float:
    """As good as any: exact in a float32."""
    return -1 - token / 16


class Conduct(Enum):
    """What a client does with its stream."""

    READ = auto()  # to the end, resuming where it broke
    REPEAT = auto()  # dies after some tokens; another one sends the same request again, and hears all from the start
    RESUME = auto()  # dies after some tokens; another one resumes at its offsets
    PAUSE = auto()  # stops reading for a while
    CANCEL = auto()  # ends it by a call of its own, and reads on
    LEAVE = auto()  # stops reading for good, and says so
    VANISH = auto()  # dies, and nobody comes back


_CONDUCTS = {
    Conduct.READ: 6,
    Conduct.REPEAT: 1,
    Conduct.RESUME: 3,
    Conduct.PAUSE: 1,
    Conduct.CANCEL: 1,
    Conduct.LEAVE: 1,
    Conduct.VANISH: 1,
}


_PATIENT = (Conduct.READ, Conduct.RESUME, Conduct.REPEAT)


@dataclass(frozen=True, slots=True)
class Planned:
    """A request before it comes."""

    name: str
    message: api.GenerateRequest
    truth: Truth
    conduct: Conduct
    after: int  # tokens that the client has when it does what is not reading
    arrives: float  # seconds after the start

    @property
    def prompt_tokens(self) -> int:
        return len(self.truth.prompt)

    @property
    def outputs(self) -> list[OutputTruth]:
        """What the client is to see: all outputs, or the best of them in their order."""
        outputs, count = self.truth.outputs, self.prompt_tokens
        if not self.message.HasField("best_of"):
            return outputs
        means = [fmean(map(logprob, output.tokens[count:])) for output in outputs]
        ranked = sorted(range(len(outputs)), key=lambda index: (-means[index], index))
        return [outputs[index] for index in ranked[: self.message.n]]


def plan_requests(rng: random.Random, count: int) -> list[Planned]:
    texts = [[rng.randrange(SHAPE.first_token, SHAPE.vocabulary) for _ in range(_LONGEST)] for _ in range(_TEXTS)]
    return [_plan(rng, number, texts) for number in range(count)]


def _plan(rng: random.Random, number: int, texts: list[list[int]]) -> Planned:
    name, salt, seed = f"r{number}", rng.choice(("", "", "salt")), rng.randrange(1 << 32)
    prompt = rng.choice(texts)[: rng.randint(1, _LONGEST)]
    outputs, most = rng.choice((1, 1, 1, 2, 3)), rng.randint(1, 10)
    stops = frozenset({rng.randrange(SHAPE.first_token, SHAPE.vocabulary)}) if rng.random() < 0.3 else frozenset()
    message = api.GenerateRequest(request_id=name, cache_salt=salt, n=outputs)
    message.token_ids.ids.extend(prompt)
    message.sampling.seed = seed
    message.stopping.max_tokens = most
    message.stopping.stop_token_ids.extend(stops)
    message.priority = rng.choice((0, 0, 0, 1))
    message.response.detach_grace.FromMilliseconds(rng.choice((0, 2_000, 30_000)))
    if rng.random() < 0.2 and len(prompt) >= SHAPE.page_size:
        message.pin_prefix = f"pin {number}"
    truth = Truth.of(
        request_key(TENANT, name),
        root_hash(FINGERPRINT, TENANT, salt),
        prompt,
        most,
        outputs,
        SHAPE,
        stops=stops,
        seed=seed,
    )
    conduct = rng.choices(list(_CONDUCTS), list(_CONDUCTS.values()))[0]
    if outputs > 1 and conduct in _PATIENT and rng.random() < 0.5:
        # Ranked when all have ended: only a request that nobody cancels has a known outcome.
        message.n, message.best_of = rng.randint(1, outputs - 1), outputs
        message.response.detach_grace.FromSeconds(30)
    return Planned(name, message, truth, conduct, rng.randint(0, most), rng.uniform(0, 0.05))
