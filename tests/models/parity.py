"""Greedy and bfloat16 parity with transformers on the real model; `python -m tests.models.parity` runs all of it.

The tests run the same functions over fewer combinations: a chunk size that no prompt reaches, for
one, computes what an unlimited one does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from time import monotonic

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from transformers.initialization import no_init_weights

from services.executor.modelstore.packed import PackedModel
from services.executor.modelstore.source import find_source
from services.executor.modelstore.store import open_model
from services.executor.runner.base import Runner
from services.executor.runner.cpu import CpuRunner
from tests.models.paging import TestPool, chunks_of, greedy
from tests.models.prompts import prompt_texts
from tests.models.tiny import round_parameters

STEPS = 64
GAP = 1e-3  # logits closer than this in the reference may come in either order
POOL_PAGES = 32 * 24
BFLOAT16_PROMPTS = (2, 4, 7, 29, 40)


@dataclass
class Judge:
    """transformers in float32, teacher-forced on what a runner wrote. Equal outputs are judged once."""

    model: transformers.PreTrainedModel
    judged: set[tuple[int, ...]] = field(default_factory=set)
    positions: int = 0
    ties: int = 0

    def check(self, prompt: list[int], output: list[int]) -> None:
        """Each token is the reference's greedy choice after the tokens before it, or within GAP of it.

        Stronger than comparing up to a first difference: what follows a tie is checked as well.
        """
        text = tuple(prompt + output)
        if text in self.judged:
            return
        self.judged.add(text)
        with torch.inference_mode():
            logits = self.model(torch.tensor([text[:-1]]), logits_to_keep=len(output)).logits[0]
        chosen = logits[torch.arange(len(output)), torch.tensor(output)]
        gaps = logits.max(dim=-1).values - chosen
        self.positions += len(output)
        self.ties += int((gaps > 0).sum())
        worst = int(gaps.argmax())
        assert float(gaps[worst]) < GAP, f"token {worst} of {output}: the reference prefers another by {gaps[worst]}"


@dataclass(frozen=True)
class Bfloat16Errors:
    """Against transformers in float32 on the same text: logit error (standard deviation), other argmaxes."""

    positions: int
    ours: float
    theirs: float
    our_differences: int
    their_differences: int

    def __str__(self) -> str:
        return (
            f"bfloat16 over {self.positions} positions: logit error {self.ours:.5f}, transformers' {self.theirs:.5f} "
            f"(ratio {self.ours / self.theirs:.3f}); other argmax at {self.our_differences} positions, "
            f"transformers' at {self.their_differences}"
        )


def load_transformers() -> transformers.PreTrainedModel:
    """In float32, with the parameters that transformers reads from the file rounded once to bfloat16."""
    path = find_source(None).path
    assert path is not None
    return round_parameters(transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name))


def encode_prompts(model: PackedModel) -> list[list[int]]:
    tokenizer = Tokenizer.from_buffer(model.tokenizer_json)
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in prompt_texts()]
    assert len(prompts) == 50 and len({tuple(prompt) for prompt in prompts}) == 50
    return prompts


def judge_greedy(
    judge: Judge, runner: Runner, pool: TestPool, prompts: list[list[int]], batch: int, chunk: int | None
) -> None:
    """The prompts in batches of `batch`, prefilled in chunks of `chunk`, STEPS tokens each."""
    for first in range(0, len(prompts), batch):
        group = prompts[first : first + batch]
        pool.reset()
        for prompt, output in zip(group, greedy(runner, pool, group, STEPS, chunk), strict=True):
            judge.check(prompt, output)


def in_bfloat16(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same model as transformers makes it in bfloat16: the rotary frequencies stay float32."""
    with no_init_weights():  # random values for all of them would take seconds
        half = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    torch.testing.assert_close(half.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=0, atol=0)
    return half.eval()


def bfloat16_errors(
    judge: Judge, model: PackedModel, float32_runner: Runner, float32_pool: TestPool, prompts: list[list[int]]
) -> Bfloat16Errors:
    """Teacher-forced on the float32 runner's greedy text, which the judge accepts as the reference's."""
    float32_pool.reset()
    outputs = greedy(float32_runner, float32_pool, prompts, 48, None)
    texts = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    half = in_bfloat16(judge.model)
    with torch.inference_mode():
        exact = np.concatenate([judge.model(torch.tensor([text])).logits[0].numpy() for text in texts])
        theirs = np.concatenate([half(torch.tensor([text])).logits[0].float().numpy() for text in texts])
    runner = CpuRunner(model, "bfloat16", "bfloat16", threads=2, isa=None)
    try:
        pool = TestPool(model.spec, runner, "bfloat16", POOL_PAGES)
        lanes = [pool.lane(text, len(text)) for text in texts]
        plans = [chunks_of(lane, len(text), 64) for lane, text in zip(lanes, texts, strict=True)]
        ours = np.concatenate([runner.logits([chunk]) for plan in plans for chunk in plan])
    finally:
        runner.close()
    best = exact.argmax(-1)
    return Bfloat16Errors(
        positions=len(best),
        ours=float(np.std(ours - exact)),
        theirs=float(np.std(theirs - exact)),
        our_differences=int((ours.argmax(-1) != best).sum()),
        their_differences=int((theirs.argmax(-1) != best).sum()),
    )


def main() -> None:
    """Every prompt, alone and in batches of 32, in chunks of 16, 64 and unlimited; bfloat16 over twelve prompts."""
    model = open_model(None)
    judge = Judge(load_transformers())
    prompts = encode_prompts(model)
    runner = CpuRunner(model, "float32", "float32", threads=2, isa=None)
    pool = TestPool(model.spec, runner, "float32", POOL_PAGES)
    for batch, chunk in product((32, 1), (16, 64, None)):
        started = monotonic()
        judge_greedy(judge, runner, pool, prompts, batch, chunk)
        print(
            f"greedy, batch {batch}, chunks {chunk or 'unlimited'}: equal ({monotonic() - started:.0f} s)", flush=True
        )
    print(f"{judge.positions} different positions judged, {judge.ties} near-ties the other way")
    print(bfloat16_errors(judge, model, runner, pool, prompts[::4]))
    runner.close()


if __name__ == "__main__":
    main()
