"""The load of `engine` through a real stack: three processes, gRPC streams, one client."""

from __future__ import annotations

import asyncio
import time

from gpu.job import Job
from gpu.parts.engine import TINY_LOAD, Load
from gpu.stack import Stack, prompts, stream_all


def run(job: Job) -> None:
    load = TINY_LOAD if job.options.tiny else Load()
    flags: dict[str, str | int | bool] = {
        "max_num_seqs": load.sequences[-1],
        "max_batch_tokens": load.step_tokens,
        "max_model_len": load.length,
    }
    with Stack(job, load.spec, **flags) as stack:
        job.say(f"the stack was ready after {stack.seconds:.1f} s")
        for sequences in load.sequences:
            wanted = prompts(load.spec, sequences, load.prompt)
            asyncio.run(stream_all(stack.address, wanted, min(4, load.new)))
            began = time.perf_counter()
            found = asyncio.run(stream_all(stack.address, wanted, load.new))
            total, first = max(one.last for one in found) - began, max(one.first for one in found) - began
            tokens = sum(len(one.tokens) for one in found)
            assert tokens == sequences * load.new, f"{tokens} tokens came, {sequences * load.new} were asked for"
            job.emit("engine", ("full stack", str(sequences)), tokens_s=tokens / total, first=first)
