"""RMSNorm and SiLU-mul round as the model that a torch program would be, and a row never depends on its neighbours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.cuda.activation import SiluMul
from kernels.cuda.elements import Dtype
from kernels.cuda.norm import Norms
from tests.kernels.cuda.host import HostDevice
from tests.kernels.cuda.tensors import assert_rounded_alike, random_tensor

EPS = 1e-5
# Idle threads in the block; single elements; more packets than threads.
SHAPES: list[tuple[int, Dtype]] = [(576, "bfloat16"), (65, "bfloat16"), (4104, "float16")]


def norm_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    factor = 1 / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (weight * (x.float() * factor.float()).to(x.dtype).float()).to(x.dtype)


def rows_of(hidden: int, dtype: Dtype) -> torch.Tensor:
    """Four rows: usual, zeros, large, tiny."""
    return random_tensor((4, hidden), dtype, seed=1, scale=torch.tensor([[1.0], [0.0], [100.0], [1e-3]]))


@pytest.mark.parametrize(("hidden", "dtype"), SHAPES)
def test_norms_round_like_the_model(scheduled_host: HostDevice, hidden: int, dtype: Dtype) -> None:
    norms = Norms(scheduled_host, hidden, dtype, EPS)
    x, residual = rows_of(hidden, dtype), random_tensor((4, hidden), dtype, seed=2)
    weight = 1 + random_tensor((hidden,), "float32", seed=3, scale=0.2)
    out, guard = torch.full((2, 5, hidden), 7.0, dtype=x.dtype)
    norms.rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), 4)
    assert_rounded_alike(out[:4], norm_of(x, weight))
    assert (out[4:] == 7).all() and (guard == 7).all()

    total = (x.float() + residual.float()).to(x.dtype)
    norms.add_rms_norm(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), 4)
    assert torch.equal(residual, total)
    assert_rounded_alike(out[:4], norm_of(total, weight))


def test_norms_of_a_row_are_the_same_alone_and_in_place(host: HostDevice) -> None:
    hidden, dtype = SHAPES[0]
    norms = Norms(host, hidden, dtype, EPS)
    x, residual, weight = rows_of(hidden, dtype), rows_of(hidden, dtype).flip(0), torch.ones(hidden)
    out, alone, alone_residual = torch.empty_like(x), x.clone(), residual.clone()
    norms.add_rms_norm(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), 4)
    for row, row_residual in zip(alone, alone_residual, strict=True):
        norms.add_rms_norm(row.data_ptr(), row_residual.data_ptr(), weight.data_ptr(), row.data_ptr(), 1)
    assert torch.equal(alone, out) and torch.equal(alone_residual, residual)


@pytest.mark.parametrize("hidden", [0, 16385])
def test_rows_that_do_not_fit_a_block_are_refused(host: HostDevice, hidden: int) -> None:
    with pytest.raises(ValueError, match="elements"):
        Norms(host, hidden, "bfloat16", EPS)


@pytest.mark.parametrize(("columns", "dtype"), [(1544, "bfloat16"), (33, "float16")])
def test_silu_mul_rounds_like_torch(host: HostDevice, columns: int, dtype: Dtype) -> None:
    gate_up = random_tensor((3, 2 * columns), dtype, seed=4, scale=4.0)
    gate_up[0, :4] = torch.tensor([200.0, -200.0, 0.0, 1e-6])
    out = torch.full((4, columns), 7.0, dtype=gate_up.dtype)
    SiluMul(host, columns, dtype).launch(gate_up.data_ptr(), out.data_ptr(), 3)
    gate, up = gate_up.chunk(2, dim=1)
    assert_rounded_alike(out[:3], F.silu(gate.double()).to(gate.dtype) * up)
    assert (out[3] == 7).all()
