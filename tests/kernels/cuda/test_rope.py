"""Norm, rotation, conversion and scatter of one layer's Q, K and V: every byte of q_out and of the pool."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from kernels.cuda.elements import ELEMENTS, Dtype, KvDtype
from kernels.cuda.pages import PageLayout
from kernels.cuda.rope import RopeAppend
from tests.kernels.cuda.host import HostDevice
from tests.kernels.cuda.tensors import TORCH, assert_rounded_alike, random_tensor

EPS = 1e-6
LAYERS, PAGES = 2, 5


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: Dtype
    kv_dtype: KvDtype
    qk_norm: bool = False
    layer_major: bool = False

    def layout(self) -> PageLayout:
        sizes = (LAYERS, self.kv_heads, self.page_size, self.head_dim, ELEMENTS[self.kv_dtype].itemsize)
        return PageLayout.layer_major(*sizes, PAGES) if self.layer_major else PageLayout.page_major(*sizes)


CASES = [
    Case(4, 2, 64, 16, "bfloat16", "bfloat16"),
    Case(5, 1, 80, 8, "float16", "fp8_e4m3", qk_norm=True, layer_major=True),
    Case(3, 3, 256, 32, "bfloat16", "fp8_e4m3"),
    Case(2, 1, 96, 64, "bfloat16", "float16", qk_norm=True),
]


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    factor = 1 / torch.sqrt(wide.double().pow(2).mean(-1, keepdim=True) + EPS)
    return ((wide * factor.float()).to(x.dtype).float() * weight).to(x.dtype)


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """float32 [tokens, heads, head_dim]; cosines, sines [tokens, head_dim / 2]."""
    low, high = x.float().chunk(2, dim=-1)
    cosines, sines = cosines[:, None], sines[:, None]
    return torch.cat((low * cosines - high * sines, high * cosines + low * sines), dim=-1)


def stored(values: torch.Tensor, scales: torch.Tensor | None, kv_dtype: KvDtype) -> torch.Tensor:
    """values: float32 [tokens, kv_heads, head_dim]."""
    if scales is not None:
        values = values * (1 / scales)[:, None]
    if kv_dtype == "fp8_e4m3":
        values = values.clamp(-448, 448)
    return values.to(TORCH[kv_dtype])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.head_dim}-{case.kv_dtype}")
def test_the_launch_is_norm_rotation_and_append(host: HostDevice, case: Case) -> None:
    layout = case.layout()
    positions = torch.tensor([0, 3, 2, 11, 7, 7, 1], dtype=torch.int32)
    places = [(4, 0), (0, 3), None, (2, case.page_size - 1), (4, 1), (3, 5), (0, 0)]  # page and slot
    slots = torch.tensor([-1 if place is None else place[0] * case.page_size + place[1] for place in places])
    tokens = len(positions)
    qkv = random_tensor((tokens + 1, case.heads + 2 * case.kv_heads, case.head_dim), case.dtype, seed=1, scale=3.0)
    angles = torch.arange(12)[:, None] * random_tensor((1, case.head_dim // 2), "float32", seed=2)
    cosines, sines = angles.cos(), angles.sin()
    q_norm, k_norm = 1 + random_tensor((2, case.head_dim), "float32", seed=3, scale=0.1)
    scaled = case.kv_dtype == "fp8_e4m3"
    k_scale = torch.linspace(0.01, 0.05, case.kv_heads)  # the first one saturates
    v_scale = torch.linspace(0.5, 2.0, case.kv_heads)
    pool = torch.full((PAGES * layout.page_bytes,), 0x5A, dtype=torch.uint8)
    q_out = torch.full((tokens + 1, case.heads, case.head_dim), 7.0, dtype=qkv.dtype)
    shape = (case.heads, case.kv_heads, case.head_dim, case.page_size)
    layer = 1
    RopeAppend(host, *shape, case.dtype, case.kv_dtype, case.qk_norm, EPS).launch(
        qkv=qkv.data_ptr(),
        q_out=q_out.data_ptr(),
        cosines=cosines.data_ptr(),
        sines=sines.data_ptr(),
        positions=positions.data_ptr(),
        slots=slots.data_ptr(),
        pool=pool.data_ptr() + layer * layout.layer_stride,
        page_stride=layout.page_stride,
        half_stride=layout.half_stride,
        k_scale=k_scale.data_ptr() if scaled else 0,
        v_scale=v_scale.data_ptr() if scaled else 0,
        q_norm=q_norm.data_ptr() if case.qk_norm else 0,
        k_norm=k_norm.data_ptr() if case.qk_norm else 0,
        tokens=tokens,
    )

    q, k, v = torch.split(qkv[:tokens], [case.heads, case.kv_heads, case.kv_heads], dim=1)
    if case.qk_norm:
        q, k = norm(q, q_norm), norm(k, k_norm)
    rotation = cosines[positions], sines[positions]
    assert_rounded_alike(q_out[:tokens], rotate(q, *rotation).to(q.dtype))
    assert (q_out[tokens:] == 7).all()

    keys = stored(rotate(k, *rotation), k_scale if scaled else None, case.kv_dtype)
    values = stored(v.float(), v_scale if scaled else None, case.kv_dtype)
    block = (case.kv_heads, case.page_size, case.head_dim)
    for half, expected in enumerate((keys, values)):
        written = torch.empty_like(expected)
        for i, place in enumerate(places):
            if place is None:
                written[i] = expected[i]
                continue
            start = place[0] * layout.page_stride + layer * layout.layer_stride + half * layout.half_stride
            run = pool[start : start + layout.run_bytes]
            written[i] = run.view(expected.dtype).view(block)[:, place[1]]
            run.view(*block[:2], -1)[:, place[1]] = 0x5A
        assert_rounded_alike(written, expected)
    assert (pool == 0x5A).all()  # nothing else was written


@pytest.mark.parametrize("head_dim", [0, 72, 528])
def test_heads_without_whole_accesses_are_refused(host: HostDevice, head_dim: int) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        RopeAppend(host, 1, 1, head_dim, 16, "bfloat16", "bfloat16")


def test_missing_norms_are_refused(host: HostDevice) -> None:
    case = CASES[3]
    rope = RopeAppend(host, 2, 1, 96, 64, case.dtype, case.kv_dtype, case.qk_norm, EPS)
    names = ("qkv", "q_out", "cosines", "sines", "positions", "slots", "pool", "page_stride", "half_stride", "tokens")
    with pytest.raises(ValueError, match="both norms"):
        rope.launch(**dict.fromkeys(names, 0), q_norm=16)
