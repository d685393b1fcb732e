"""Times the native kernels; `python -m tests.kernels.bench [LIBRARY]` compares them with another build, in turns.

One thread, processor time, the best of several turns: other work on the machine disturbs that least. The model
has SmolLM2-135M's shape and random weights. A build of another ABI cannot be compared.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from kernels.cpu.native import ModelShape, NativeSampling, available_isas
from tests.kernels.variants import PLAIN, Pages, Sequence, Variant, as_chunks, random_tensors

SHAPE = ModelShape(
    layers=30,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    intermediate=1536,
    vocab=49152,
    max_positions=2048,
    rms_norm_eps=1e-5,
    sliding_window=0,
    logit_softcap=0.0,
    tied_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
)
TURNS = 7
GREEDY = replace(PLAIN, logprobs=False)
Job = Callable[[], object]


def sequences(pages: Pages, count: int, length: int) -> list[Sequence]:
    """Sequences whose pages hold something, as bfloat16 or as a scale of int8."""
    pages.planes[...] = 0x3C
    rng = np.random.default_rng(1)
    tokens = [rng.integers(0, SHAPE.vocab, length).astype(np.uint32) for _ in range(count)]
    return [Sequence(t, pages.row(length), NativeSampling(GREEDY)) for t in tokens]


def steps(variant: Variant, tensors: dict[str, np.ndarray], kv_dtype: str) -> dict[str, Job]:
    """Whole steps: decodes after 300 positions, and a prompt."""
    model = variant.model(SHAPE, tensors, "bfloat16", kv_dtype=kv_dtype)
    jobs: dict[str, Job] = {}
    pages = Pages(model, SHAPE, kv_dtype, 64 * 19 + 33, 16)
    lanes = sequences(pages, 64, 300)
    prompt = sequences(pages, 1, 512)[0]

    def job(lanes: list[Sequence], start: int, count: int) -> Job:
        chunks = as_chunks([lane.chunk(start, count, sample=True) for lane in lanes])
        tokens, logprobs = np.zeros(len(chunks), np.uint32), np.zeros(len(chunks), np.float32)

        def run(kept: object = (pages, lanes)) -> None:  # chunks refer to them by address
            model.step(chunks, tokens, logprobs)

        return run

    for batch in (1, 8, 32, 64):
        jobs[f"decode step, batch {batch}, {kv_dtype}"] = job(lanes[:batch], 299, 1)
    jobs[f"prefill step, 512 positions, {kv_dtype}"] = job([prompt], 0, 512)
    return jobs


def attentions(variant: Variant, kv_dtype: str) -> dict[str, Job]:
    """Attention of all layers alone."""
    jobs: dict[str, Job] = {}
    for batch, start, count in ((32, 299, 1), (4, 1999, 1), (1, 0, 512)):
        model = variant.attention(SHAPE, "bfloat16", kv_dtype)
        pages = Pages(model, SHAPE, kv_dtype, batch * (start + count + 15) // 16 + 4, 16)
        lanes = sequences(pages, batch, start + count)
        chunks = as_chunks([lane.chunk(start, count) for lane in lanes])
        width = (SHAPE.heads + 2 * SHAPE.kv_heads) * SHAPE.head_dim
        qkv = np.random.default_rng(1).normal(size=(batch * count, width)).astype(np.float32)

        def job(model=model, chunks=chunks, qkv=qkv, kept=(pages, lanes)) -> None:  # type: ignore[no-untyped-def]
            for layer in range(SHAPE.layers):
                model.attend(layer, chunks, qkv)

        jobs[f"attention, {batch} x {count} after {start}, {kv_dtype}"] = job
    return jobs


def samplings(variant: Variant) -> dict[str, Job]:
    """One token of logits that are spread as a language model's are."""
    rng = np.random.default_rng(0)
    logits = np.concatenate([rng.normal(0, 2.5, SHAPE.vocab - 200), rng.normal(8, 3, 200)]).astype(np.float32)
    tokens = np.arange(50, dtype=np.uint32)
    model = variant.sampler(SHAPE.vocab)
    plans = {
        "sample, greedy": GREEDY,
        "sample, temperature 1": replace(GREEDY, temperature=1.0),
        "sample, top_p 0.95": replace(GREEDY, temperature=1.0, top_p=0.95),
        "sample, top_k 50": replace(GREEDY, temperature=1.0, top_k=50),
        "sample, log-probability": PLAIN,
    }
    natives = {name: NativeSampling(fields) for name, fields in plans.items()}

    def job(sampling: NativeSampling) -> Job:
        return lambda: [model.sample(logits, sampling, tokens) for _ in range(20)]

    return {f"{name}, 20 times": job(sampling) for name, sampling in natives.items()}


def main() -> None:
    tensors = random_tensors(SHAPE)
    libraries = [Path(argument) for argument in sys.argv[1:]] or []
    variants = [Variant(available_isas()[-1], library) for library in (*libraries, None)]
    jobs: list[dict[str, Job]] = []
    for variant in variants:
        jobs.append(samplings(variant))
        for kv_dtype in ("bfloat16", "int8"):
            jobs[-1] |= steps(variant, tensors, kv_dtype) | attentions(variant, kv_dtype)
    print(f"{'ms':40}" + "".join(f"{library.name:>16}" for library in libraries) + f"{'installed':>16}")
    for name in jobs[0]:
        best = [float("inf")] * len(variants)
        for _ in range(TURNS):
            for i, job in enumerate(jobs):
                started = time.process_time()
                job[name]()
                best[i] = min(best[i], time.process_time() - started)
        ratio = f"   {best[0] / best[-1]:.2f} times as fast" if libraries else ""
        print(f"{name:40}" + "".join(f"{seconds * 1e3:16.2f}" for seconds in best) + ratio, flush=True)


if __name__ == "__main__":
    main()
