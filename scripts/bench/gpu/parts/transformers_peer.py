"""The load of `engine` through transformers' own continuous batching, `generate_batch`, with its paged attention."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from gpu.job import Job
from gpu.model import configuration
from gpu.parts.engine import TINY_LOAD, Load

# Its flash variants need a package that has to be fetched.
ATTENTION = "paged|sdpa"


def run(job: Job) -> None:
    load = replace(TINY_LOAD, sequences=(1, 2)) if job.options.tiny else Load()
    device = job.bed.torch_device
    options = {name: value for name, value in configuration(load.spec).items() if name != "model_type"}
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**options)).eval()
        torch.set_default_dtype(torch.float32)
    model.set_attn_implementation(ATTENTION)
    job.note(f"transformers {transformers.__version__} with {ATTENTION}; the second of two calls")
    for sequences in load.sequences:
        if job.left() < 60:
            job.note(f"no time was left for {sequences} sequences")
            return
        # The first call makes the manager, its cache and graphs; other prompts then, for it keeps prefixes.
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed)
            prompts = torch.randint(1, load.spec.vocab_size, (sequences, load.prompt), generator=generator)
            seconds, tokens = _seconds(model, prompts.tolist(), load.new)
        model.destroy_cached_continuous_batching_manager()
        assert tokens == sequences * load.new, f"{tokens} tokens came, {sequences * load.new} were asked for"
        job.emit("engine", ("transformers", str(sequences)), tokens_s=tokens / seconds)


def _seconds(model: LlamaForCausalLM, prompts: list[list[int]], new: int) -> tuple[float, int]:
    """Seconds and generated tokens of all prompts."""
    wanted = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, bos_token_id=1)
    began = time.perf_counter()
    found = model.generate_batch(inputs=prompts, generation_config=wanted, persistent_manager=True)
    seconds = time.perf_counter() - began
    failed = [output.error for output in found.values() if output.error]
    assert not failed, failed[0]
    return seconds, sum(len(output.generated_tokens) for output in found.values())
