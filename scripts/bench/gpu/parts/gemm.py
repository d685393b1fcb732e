"""The fixed-tile GEMM beside torch's, over the linear layers of an 8B model; and whether its rows stand alone."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

from gpu.job import Job
from kernels.cuda.gemm import FixedGemm

# Outputs, inputs: Llama-3-8B.
SHAPES: Final = {
    "qkv": (6144, 4096),
    "attention output": (4096, 4096),
    "gate and up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
ROWS: Final = (1, 32, 256, 2048)
_ROTATED_BYTES: Final = 512 << 20  # of weights: a model's layers never find theirs in the L2 cache


def run(job: Job) -> None:
    bed = job.bed
    fixed = FixedGemm(bed.kernels, "bfloat16")
    shapes = {"tiny": (128, 64)} if job.options.tiny else SHAPES
    for name, (n, k) in shapes.items():
        copies = 1 if job.options.tiny else max(2, -(-_ROTATED_BYTES // (2 * n * k)))
        weights = [torch.randn(n, k, device=bed.torch_device).mul_(k**-0.5).bfloat16() for _ in range(copies)]
        for m in (1, 3) if job.options.tiny else ROWS:
            if name == "head" and m > 256:
                continue  # only rows that sample pass it
            a = torch.randn(m, k, device=bed.torch_device).bfloat16()
            out = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device=bed.torch_device)

            def ours(weight: torch.Tensor, a: torch.Tensor = a, out: torch.Tensor = out) -> None:
                m, n, k = a.shape[0], *weight.shape
                fixed.launch(a=a.data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(), m=m, n=n, k=k)

            def theirs(weight: torch.Tensor, a: torch.Tensor = a, out: torch.Tensor = out) -> None:
                torch.mm(a, weight.T, out=out)

            ours(weights[0])
            bed.synchronize()
            wanted = a.double() @ weights[0].double().T if n <= 28672 else a[:1].double() @ weights[0].double().T
            error = float((out[: len(wanted)].double() - wanted).norm() / wanted.norm())
            del wanted
            together, alone = out[-1].clone(), torch.empty_like(out[:1])
            ours(weights[0], a[-1:], alone)
            bed.synchronize()
            seconds = bed.seconds([partial(ours, weight) for weight in weights])
            torch_seconds = bed.seconds([partial(theirs, weight) for weight in weights])
            job.emit(
                "gemm",
                (f"{name}, {n} x {k}", str(m)),
                seconds=seconds,
                torch=torch_seconds,
                slower=seconds / torch_seconds,
                error=error,
                same_rows="yes" if torch.equal(together, alone[0]) else "NO",
            )
        del weights
