"""Tensors of the tests of element-wise kernels, and how their results are compared."""

from __future__ import annotations

import torch

TORCH: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
}


def random_tensor(shape: tuple[int, ...], dtype: str, seed: int, scale: float | torch.Tensor = 1.0) -> torch.Tensor:
    """Normal values times the scale, rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(TORCH[dtype])


def assert_rounded_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for a few elements that are one place of the last digit off: sums in another order can do that."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    off = (_order(actual) - _order(expected)).abs()
    assert off.max() <= 1
    assert off.float().mean() <= 0.002


def _order(values: torch.Tensor) -> torch.Tensor:
    """Integers that count the representable numbers; both zeros are 0."""
    width = 8 * values.element_size()
    bits = values.view({8: torch.int8, 16: torch.int16}[width]).int()
    return torch.where(bits < 0, -(bits & (1 << (width - 1)) - 1), bits)
