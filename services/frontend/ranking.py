"""Which of the sampled outputs a client gets, and in which order. Pure: the logs alone decide."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pagehold.v1 import inference_pb2 as api


def outputs_asked(request: api.GenerateRequest) -> int:
    """How many outputs the client gets."""
    return request.n if request.HasField("n") else 1


def outputs_sampled(request: api.GenerateRequest) -> int:
    """How many outputs are sampled. More than are asked for: they are ranked."""
    return request.best_of if request.HasField("best_of") else outputs_asked(request)


def best(logprobs: Sequence[Sequence[float]], n: int) -> list[int]:
    """The `n` outputs with the highest mean log-probability of a token, best first.

    logprobs: of each output's final tokens, as its log holds them. An output without tokens comes
    last; of equals the one that was sampled at the lower index comes first.
    """
    scores = [_mean(output) for output in logprobs]
    return sorted(range(len(scores)), key=lambda index: -scores[index])[:n]  # a stable sort


def _mean(logprobs: Sequence[float]) -> float:
    if not logprobs:
        return -math.inf
    # Summed exactly: two readers of one log must never differ, however their tokens came.
    mean = math.fsum(logprobs) / len(logprobs)
    return -math.inf if math.isnan(mean) else mean
