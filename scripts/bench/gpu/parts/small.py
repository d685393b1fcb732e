"""The kernels beside attention and GEMMs, at an 8B model's sizes: time, and bytes over the copy rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch

from gpu.bed import Bed, Launch
from gpu.job import Job
from gpu.parts.copy import copy_rate
from gpu.pool import Pool, Shape
from kernels.cuda.activation import SiluMul
from kernels.cuda.norm import Norms
from kernels.cuda.pages import PageCopy, PageLayout
from kernels.cuda.rope import RopeAppend
from kernels.cuda.sampling import SAMPLING, WANT_LOGPROB, Sampler


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model and its steps."""

    hidden: int = 4096
    heads: int = 32
    middle: int = 14336
    vocab: int = 128256
    layers: int = 32
    rows: tuple[int, ...] = (32, 256, 2048)
    samples: tuple[int, ...] = (1, 32, 256)
    pages: int = 64


TINY: Final = Sizes(128, 8, 64, 100, 2, (2,), (2,), 2)
_MOST_COPIES: Final = 64


def run(job: Job) -> None:
    bed, sizes = job.bed, TINY if job.options.tiny else Sizes()
    rate = copy_rate(bed)

    def emit(kernel: str, size: str, nbytes: int, launches: Sequence[Launch]) -> None:
        seconds = bed.seconds(launches)
        moved = nbytes / seconds
        job.emit("small", (kernel, size), seconds=seconds, gb_s=moved / 1e9, of_copy=moved / rate)

    for rows in sizes.rows:
        _norms(bed, sizes, rows, emit)
        _activation(bed, sizes, rows, emit)
        _rope(bed, sizes, rows, emit)
    _pages(bed, sizes, emit)
    for rows in sizes.samples:
        _sampling(bed, sizes, rows, emit)


Emit = Callable[[str, str, int, Sequence[Launch]], None]


def _tensors(bed: Bed, rows: int, columns: int) -> list[torch.Tensor]:
    """As many as do not fit the L2 cache together."""
    count = min(_MOST_COPIES, 1 + 2 * bed.l2_bytes // (2 * rows * columns))
    return [torch.randn(rows, columns, device=bed.torch_device).bfloat16() for _ in range(count)]


def _norms(bed: Bed, sizes: Sizes, rows: int, emit: Emit) -> None:
    norms = Norms(bed.kernels, sizes.hidden, "bfloat16", 1e-5)
    weight = torch.ones(sizes.hidden, device=bed.torch_device)
    inputs, residuals, outputs = (_tensors(bed, rows, sizes.hidden) for _ in range(3))

    def launch(x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
        norms.add_rms_norm(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), rows)

    launches = [partial(launch, *one) for one in zip(inputs, residuals, outputs, strict=True)]
    emit("add + RMSNorm", f"{rows} rows", 4 * 2 * rows * sizes.hidden, launches)


def _activation(bed: Bed, sizes: Sizes, rows: int, emit: Emit) -> None:
    silu = SiluMul(bed.kernels, sizes.middle, "bfloat16")
    inputs = _tensors(bed, rows, 2 * sizes.middle)
    out = torch.empty(rows, sizes.middle, dtype=torch.bfloat16, device=bed.torch_device)
    launches = [partial(silu.launch, one.data_ptr(), out.data_ptr(), rows) for one in inputs]
    emit("SiLU-mul", f"{rows} rows", 3 * 2 * rows * sizes.middle, launches)


def _rope(bed: Bed, sizes: Sizes, rows: int, emit: Emit) -> None:
    shape = Shape()
    rope = RopeAppend(bed.kernels, sizes.heads, shape.kv_heads, shape.head_dim, shape.page_size, "bfloat16", "bfloat16")
    width = (sizes.heads + 2 * shape.kv_heads) * shape.head_dim
    pool = Pool(bed, shape, max(4, 2 * rows // shape.page_size), sizes.layers, "page-major")
    rng = np.random.default_rng(0)
    slots = rng.permutation(pool.pages * shape.page_size)[:rows].astype(np.int64)
    angles = torch.rand(4096, shape.head_dim // 2, device=bed.torch_device)
    cosines, sines = angles.cos(), angles.sin()
    positions, places = (
        torch.from_numpy(array).to(bed.torch_device) for array in (rng.integers(0, 4096, rows).astype(np.int32), slots)
    )
    q_out = torch.empty(rows, sizes.heads * shape.head_dim, dtype=torch.bfloat16, device=bed.torch_device)

    def launch(qkv: torch.Tensor, layer: int) -> None:
        rope.launch(
            qkv=qkv.data_ptr(),
            q_out=q_out.data_ptr(),
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            positions=positions.data_ptr(),
            slots=places.data_ptr(),
            pool=pool.address(layer),
            page_stride=pool.page_stride,
            half_stride=pool.half_stride,
            tokens=rows,
        )

    launches = [partial(launch, qkv, i % pool.layers) for i, qkv in enumerate(_tensors(bed, rows, width))]
    emit("rotary + append", f"{rows} rows", 2 * 2 * rows * width, launches)


def _pages(bed: Bed, sizes: Sizes, emit: Emit) -> None:
    shape, count = Shape(), sizes.pages
    pool = Pool(bed, shape, 4 * count, sizes.layers, "page-major")
    layout = PageLayout.page_major(sizes.layers, shape.kv_heads, shape.page_size, shape.head_dim, shape.dtype.itemsize)
    copy = PageCopy(bed.kernels, layout)
    chosen = np.random.default_rng(0).permutation(pool.pages).astype(np.int32)
    pairs = np.zeros((count, 4), np.int32)
    pairs[:, 0], pairs[:, 1], pairs[:, 2] = chosen[:count], chosen[count : 2 * count], shape.page_size
    on_device = torch.from_numpy(pairs).to(bed.torch_device)
    ids = torch.from_numpy(chosen[:count]).to(bed.torch_device)
    nbytes = count * layout.page_bytes
    launch = partial(copy.copy_slots, pool.address(0), on_device.data_ptr(), count)
    emit("copies of pages", f"{count} pages", 2 * nbytes, [launch])
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=bed.real)
    for name, move in (("pages to host memory", copy.gather), ("pages from host memory", copy.scatter)):
        launch = partial(move, pool.address(0), ids.data_ptr(), host.data_ptr(), count)
        emit(name, f"{count} pages", nbytes, [launch])


def _sampling(bed: Bed, sizes: Sizes, rows: int, emit: Emit) -> None:
    sampler = Sampler(bed.kernels, sizes.vocab, "float32")
    device, stride = bed.torch_device, 2048
    samples = torch.tensor([[row, 1024, 1, 0] for row in range(rows)], dtype=torch.int32, device=device)
    history = torch.randint(0, sizes.vocab, (rows, stride), dtype=torch.int32, device=device)
    scratch = bed.scratch(sampler.scratch_bytes(rows))
    tokens, logprobs = torch.zeros(rows, dtype=torch.int32, device=device), torch.zeros(rows, device=device)
    none = bed.scratch(16)
    logits = [
        2.5 * torch.randn(rows, sizes.vocab, device=device)
        for _ in range(min(4, 1 + 2**28 // (4 * rows * sizes.vocab)))
    ]
    plans: dict[str, dict[str, float]] = {
        "greedy": {"temperature": 0},
        "temperature 1": {},
        "top_p 0.95": {"top_p": 0.95},
        "top_k 50": {"top_k": 50},
        "penalties, log-probability": {"repetition": 1.1, "presence": 0.1, "flags": WANT_LOGPROB},
    }
    for name, fields in plans.items():
        params = np.zeros(rows, SAMPLING)
        params["temperature"] = params["top_p"] = params["repetition"] = 1
        params["seed"], params["prompt_length"] = np.arange(rows), 512
        for field, value in fields.items():
            params[field] = value
        on_device = torch.from_numpy(params.view(np.uint8)).to(device)

        def launch(one: torch.Tensor, params: torch.Tensor = on_device) -> None:
            sampler.launch(
                logits=one.data_ptr(),
                row_stride=sizes.vocab,
                samples=samples.data_ptr(),
                params=params.data_ptr(),
                bias_ids=none.data_ptr(),
                bias_values=none.data_ptr(),
                suppressed_ids=none.data_ptr(),
                history=history.data_ptr(),
                history_stride=stride,
                scratch=scratch.data_ptr(),
                tokens_out=tokens.data_ptr(),
                logprobs_out=logprobs.data_ptr(),
                rows=rows,
            )

        launches = [partial(launch, one) for one in logits]
        emit(f"sampling, {name}", f"{rows} rows of {sizes.vocab}", 4 * rows * sizes.vocab, launches)
