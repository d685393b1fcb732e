"""The deterministic product: right at every border, and a row has the same bits in every batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.cuda.elements import Dtype
from kernels.cuda.gemm import FixedGemm
from tests.kernels.cuda.host import HostDevice
from tests.kernels.cuda.tensors import TORCH, random_tensor


def product(
    gemm: FixedGemm,
    a: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    float32_out: bool = False,
) -> torch.Tensor:
    """Of contiguous a and weight; checks that nothing is written behind the result."""
    (m, k), n = a.shape, len(weight)
    out = torch.full((m * n + 64,), 7.0, dtype=torch.float32 if float32_out else a.dtype)
    gemm.launch(
        a=a.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        m=m,
        n=n,
        k=k,
        bias=0 if bias is None else bias.data_ptr(),
        float32_out=float32_out,
    )
    assert (out[m * n :] == 7).all()
    return out[: m * n].view(m, n)


def integers(rows: int, columns: int, dtype: Dtype, seed: int) -> torch.Tensor:
    """Whole numbers of -3 to 3, so that every sum is exact; NaN behind the last row."""
    generator = torch.Generator().manual_seed(seed)
    padded = torch.full((rows + 1, columns), float("nan"), dtype=TORCH[dtype])
    padded[:rows] = torch.randint(-3, 4, (rows, columns), generator=generator).to(padded.dtype)
    return padded[:rows]


# Whole and ragged, an odd number of columns, a short last step, more steps than stages. On the four multiprocessors of
# the stand-in the last one takes the wide tile.
@pytest.mark.parametrize(
    ("m", "n", "k", "dtype"),
    [
        (1, 64, 64, "bfloat16"),
        (7, 131, 536, "bfloat16"),
        (64, 72, 8, "bfloat16"),
        (65, 130, 72, "bfloat16"),
        (150, 131, 536, "float16"),
    ],
)
@pytest.mark.parametrize("float32_out", [False, True])
def test_sums_of_integers_are_exact(
    scheduled_host: HostDevice, m: int, n: int, k: int, dtype: Dtype, float32_out: bool
) -> None:
    gemm = FixedGemm(scheduled_host, dtype)
    a, weight, bias = integers(m, k, dtype, 1), integers(n, k, dtype, 2), integers(1, n, dtype, 3)[0]
    expected = a.double() @ weight.double().T
    for added, sums in ((None, expected), (bias, expected + bias.double())):
        result = product(gemm, a, weight, added, float32_out)
        assert torch.equal(result, sums.to(result.dtype))


def test_a_row_has_the_same_bits_in_every_batch_and_tile(host_cache: Path) -> None:
    narrow = FixedGemm(HostDevice(host_cache, multiprocessors=1000), "bfloat16")
    wide = FixedGemm(HostDevice(host_cache, multiprocessors=1), "bfloat16")
    a, weight = random_tensor((150, 200), "bfloat16", seed=1), random_tensor((80, 200), "bfloat16", seed=2)
    whole = product(wide, a, weight, float32_out=True)
    for first, end in ((0, 1), (149, 150), (3, 64), (40, 104), (85, 150), (0, 150)):
        for gemm in (narrow, wide):
            assert torch.equal(product(gemm, a[first:end], weight, float32_out=True), whole[first:end])
    error = (whole.double() - a.double() @ weight.double().T).abs()
    assert error.max() < 1e-4


@pytest.mark.parametrize("k", [0, 4, 65])
def test_rows_without_whole_accesses_are_refused(host: HostDevice, k: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        FixedGemm(host, "bfloat16").launch(a=0, weight=0, out=0, m=1, n=1, k=k)
