"""One small comparison for each family of kernels: what planted bugs must break, and what the sanitizers watch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch

from kernels.cuda.activation import SiluMul
from kernels.cuda.attention import AttentionShape, PagedAttention
from kernels.cuda.device import Device
from kernels.cuda.gemm import FixedGemm
from kernels.cuda.norm import Norms
from kernels.cuda.pages import PageCopy, PageLayout
from kernels.cuda.rope import RopeAppend
from kernels.cuda.sampling import Sampler
from kernels.reference import Sampling
from tests.kernels.cuda.attention_cases import Sequences, Span
from tests.kernels.cuda.tensors import random_tensor
from tests.kernels.cuda.test_sampling import SMALL, Row
from tests.kernels.cuda.test_sampling import check as check_sampled

Check = Callable[[Device], None]
"""Runs kernels on the device and raises AssertionError when a result is wrong."""

SHAPE = AttentionShape(heads=4, kv_heads=1, head_dim=64, page_size=8, dtype="bfloat16", kv_dtype="bfloat16")
SHORT: list[Span] = [(70, 1), (8, 1), (200, 1)]
CHUNKS: list[Span] = [(62, 15), (0, 21), (120, 16)]
LONG: list[Span] = [(1100, 1)]  # more tiles than page ids are held for


def decode(device: Device) -> None:
    """Several splits, merged."""
    check_attention(PagedAttention(device, SHAPE, "decode"), SHORT, fixed_split=64)


def decode_long(device: Device) -> None:
    check_attention(PagedAttention(device, SHAPE, "decode"), LONG, fixed_split=2048)


def append(device: Device) -> None:
    check_attention(PagedAttention(device, SHAPE, "append"), CHUNKS, fixed_split=128)


def check_attention(kernel: PagedAttention, spans: list[Span], fixed_split: int) -> None:
    sequences = Sequences(SHAPE, spans)
    assert sequences.error(sequences.run([kernel], fixed_split=fixed_split)) < 6e-3


def gemm(device: Device) -> None:
    a, weight = random_tensor((130, 328), "bfloat16", 1), random_tensor((72, 328), "bfloat16", 2)
    padded = torch.cat([a, torch.full_like(a[:1], float("nan"))])
    for rows in (3, 130):
        out = torch.empty(rows, 72)
        rest = {"m": rows, "n": 72, "k": 328, "float32_out": True}
        FixedGemm(device, "bfloat16").launch(
            a=padded[-1 - rows :].data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(), **rest
        )
        np.testing.assert_allclose(out, a[-rows:].double() @ weight.double().T, atol=1e-3)


def norm(device: Device) -> None:
    x, weight = random_tensor((3, 576), "bfloat16", 1), torch.ones(576)
    out = torch.empty_like(x)
    Norms(device, 576, "bfloat16", 1e-5).rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), 3)
    wide = x.double()
    expected = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    np.testing.assert_allclose(out.double(), expected, rtol=1e-2, atol=1e-3)


def activated(device: Device) -> None:
    x, out = random_tensor((3, 2, 136), "bfloat16", 1), torch.empty(3, 136, dtype=torch.bfloat16)
    SiluMul(device, 136, "bfloat16").launch(x.data_ptr(), out.data_ptr(), 3)
    gate, up = x.double().unbind(1)
    np.testing.assert_allclose(out.double(), gate * torch.sigmoid(gate) * up, rtol=2e-2, atol=1e-3)


def rotated(device: Device) -> None:
    """By no angle, into the first slots of two pages."""
    x = random_tensor((5, 8, 64), "bfloat16", 1)
    queries, pool = torch.zeros(5, 4, 64, dtype=x.dtype), torch.full((2, 2, 2, 8, 64), 7.0, dtype=x.dtype)
    cosines, sines = torch.ones(5, 32), torch.zeros(5, 32)
    slots, positions = torch.tensor([8, 9, -1, 0, 1]), torch.arange(5, dtype=torch.int32)
    RopeAppend(device, 4, 2, 64, 8, "bfloat16", "bfloat16").launch(
        qkv=x.data_ptr(),
        q_out=queries.data_ptr(),
        cosines=cosines.data_ptr(),
        sines=sines.data_ptr(),
        positions=positions.data_ptr(),
        slots=slots.data_ptr(),
        pool=pool.data_ptr(),
        page_stride=pool.stride(0) * 2,
        half_stride=pool.stride(1) * 2,
        tokens=5,
    )
    assert torch.equal(queries, x[:, :4])
    expected = torch.full_like(pool, 7.0)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // 8, :, :, slot % 8] = x[token, 4:].view(2, 2, 64)
    assert torch.equal(pool, expected)


def moved(device: Device) -> None:
    """Pages to a packed buffer, back to others, and a copy of some slots."""
    pool = random_tensor((5, 3, 2, 2, 8, 64), "bfloat16", 1)
    copy = PageCopy(device, PageLayout.page_major(3, 2, 8, 64, 2))
    before, packed = pool.clone(), torch.empty_like(pool[:2])
    sources, targets = (np.array(ids, np.int32) for ids in ((3, 0), (1, 4)))
    copy.gather(pool.data_ptr(), sources.ctypes.data, packed.data_ptr(), 2)
    copy.scatter(pool.data_ptr(), targets.ctypes.data, packed.data_ptr(), 2)
    pairs = np.array([[0, 2, 5, 0]], np.int32)
    copy.copy_slots(pool.data_ptr(), pairs.ctypes.data, 1)
    before[[1, 4]] = before[[3, 0]]
    before[2, :, :, :, :5] = before[0, :, :, :, :5]
    assert torch.equal(pool, before)


def sampled(device: Device) -> None:
    """Filters, penalties and plain draws, over several blocks for each row."""
    logits = np.random.default_rng(7).normal(0, 3, (4, 1300)).astype(np.float32)
    rows = [
        Row(logits[0], Sampling(seed=1, top_k=40, top_p=0.9)),
        Row(logits[1], Sampling(seed=2, repetition_penalty=1.4, presence_penalty=0.3), (5, 9, 5, 700), 2),
        Row(logits[2], Sampling(seed=3, bias={17: 9.0, 1200: 9.5}, suppressed=[17, 3], min_tokens=2)),
        Row(logits[3], Sampling(seed=4)),
    ]
    check_sampled(Sampler(device, 1300, "float32", SMALL), rows)


CHECKS: Final[tuple[Check, ...]] = (decode, decode_long, append, gemm, norm, activated, rotated, moved, sampled)
