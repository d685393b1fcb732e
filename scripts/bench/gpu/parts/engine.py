"""Whole steps through the CUDA runner alone: no processes, no gRPC; without and with --deterministic."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from gpu.job import Job
from gpu.model import LLAMA_3_8B, TINY, make_packed, total_bytes, weight_bytes
from gpu.parts.copy import copy_rate
from kvmanager.layout import Strides
from services.executor.modelstore.spec import DecoderSpec
from services.executor.runner.base import Chunk, Lane, SamplingParams
from services.executor.runner.cuda.limits import Limits
from services.executor.runner.cuda.platform import Platform
from services.executor.runner.cuda.pool import DeviceMemory
from services.executor.runner.cuda.runner import CudaRunner

PAGE_SIZE: Final = 16


@dataclass(frozen=True, slots=True)
class Load:
    """What every engine gets."""

    spec: DecoderSpec = LLAMA_3_8B
    sequences: tuple[int, ...] = (1, 32, 256)
    prompt: int = 1024
    new: int = 256
    step_tokens: int = 2048

    @property
    def length(self) -> int:
        return self.prompt + self.new


TINY_LOAD: Final = Load(TINY, (1, 2), 20, 3, 32)


def bound(load: Load, sequences: int, rate: float) -> float:
    """Seconds that a decode step needs to read weights and K/V, half-way through the new tokens, at the copy rate."""
    spec, context = load.spec, load.prompt + load.new / 2
    token_bytes = spec.layers * 2 * spec.kv_heads * spec.head_dim * 2
    return (weight_bytes(spec) + sequences * context * token_bytes) / rate


def run(job: Job) -> None:
    bed, load = job.bed, TINY_LOAD if job.options.tiny else Load()
    rate = copy_rate(bed)
    weights = np.empty(total_bytes(load.spec), np.uint8)
    model = make_packed(load.spec, job.options.work, weights, bed.torch_device)
    job.say(f"{len(weights) / 2**30:.1f} GiB of random weights after {job.options.limit - job.left():.0f} s")
    limits = Limits(PAGE_SIZE, load.length + PAGE_SIZE, load.sequences[-1], load.step_tokens)
    for deterministic in (False, True):
        runner = CudaRunner(model, _platform(job), limits, "bfloat16", "bfloat16", deterministic)
        bench = Bench(runner, load, bed.torch_device)
        name = "runner, deterministic" if deterministic else "runner"
        for sequences in load.sequences:
            bench.run(sequences, load.prompt, min(load.new, 8))  # compilations, handles, the allocator
            found = bench.run(sequences, load.prompt, load.new)
            limit = bound(load, sequences, rate)
            job.emit(
                "engine",
                (name, str(sequences)),
                tokens_s=sequences * load.new / found.total,
                decode_tokens_s=sequences / found.step,
                step=found.step,
                bound=limit,
                of_bound=limit / found.step,
                first=found.first,
            )
        runner.close()
        del runner, bench
        gc.collect()


def _platform(job: Job) -> Platform:
    if job.options.tiny:
        from kernels.cuda.device import Device
        from tests.device.host_driver import HostPlatform

        device: Device = job.bed.kernels
        return HostPlatform(device)  # type: ignore[arg-type]
    from services.executor.runner.cuda.gpu_platform import GpuPlatform

    return GpuPlatform(0)


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds."""

    total: float
    first: float  # until the last sequence has its first token
    step: float  # median decode step


class Bench:
    """Prompts first, in steps that are full of them; then all sequences decode, one step ahead."""

    def __init__(self, runner: CudaRunner, load: Load, device: torch.device) -> None:
        self.runner, self.load = runner, load
        self.row_pages = -(-load.length // PAGE_SIZE)
        pages = 1 + self.row_pages * load.sequences[-1]
        half = load.spec.kv_heads * PAGE_SIZE * load.spec.head_dim * 2
        strides = Strides(page=2 * half, layer=pages * 2 * half, half=half)  # layer by layer, as it is served
        self.memory = torch.zeros(load.spec.layers * strides.layer, dtype=torch.uint8, device=device)
        owned = DeviceMemory(self.memory.data_ptr(), self.memory.nbytes, self.memory)
        runner.map_pool(owned, pages, PAGE_SIZE, strides)
        self.order = 1 + np.random.default_rng(0).permutation(pages - 1).astype(np.uint64)

    def run(self, sequences: int, prompt: int, new: int) -> Times:
        lanes = [self._lane(i, prompt) for i in range(sequences)]
        for lane in lanes:
            self.runner.prepare(lane, prompt)
        began = time.perf_counter()
        for chunks in self._prefills(lanes, prompt):
            self.runner.step(chunks)
        first = time.perf_counter() - began
        ends = [time.perf_counter()]
        flight = None
        for position in range(prompt, prompt + new - 1):
            following = self.runner.submit([Chunk(lane, position, 1, position, True) for lane in lanes])
            if flight is not None:
                self.runner.collect(flight)
                ends.append(time.perf_counter())
            flight = following
        if flight is not None:
            self.runner.collect(flight)
            ends.append(time.perf_counter())
        total = time.perf_counter() - began
        for lane in lanes:
            self.runner.release(lane)
        return Times(total, first, float(np.median(np.diff(ends))))

    def _lane(self, index: int, prompt: int) -> Lane:
        load = self.load
        tokens = np.zeros(load.length + PAGE_SIZE, np.uint32)
        tokens[:prompt] = np.random.default_rng(index).integers(1, load.spec.vocab_size, prompt)
        row = self.order[index * self.row_pages : (index + 1) * self.row_pages]
        return Lane(tokens, prompt, 0, SamplingParams(temperature=0.0), row.copy())

    def _prefills(self, lanes: list[Lane], prompt: int) -> list[list[Chunk]]:
        """Steps that are full, but for the last."""
        steps: list[list[Chunk]] = [[]]
        left = self.load.step_tokens
        for lane in lanes:
            start = 0
            while start < prompt:
                count = min(left, prompt - start)
                steps[-1].append(Chunk(lane, start, count, start, start + count == prompt))
                start, left = start + count, left - count
                if not left:
                    steps.append([])
                    left = self.load.step_tokens
        return [step for step in steps if step]
