"""The matrix products of the linear layers: torch's, or a kernel whose rows do not depend on the batch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from kernels.cuda.device import Device
from kernels.cuda.elements import Dtype
from kernels.cuda.gemm import FixedGemm


class Products(ABC):
    @abstractmethod
    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        """out = x weight^T + bias. x [rows, inputs], weight [outputs, inputs], out [rows, outputs], contiguous."""


class TorchProducts(Products):
    """cuBLAS picks an algorithm by shape, so a row may round differently in another batch."""

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)


class FixedProducts(Products):
    """One tile shape, sums in one order."""

    def __init__(self, device: Device, dtype: Dtype) -> None:
        self._gemm = FixedGemm(device, dtype)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        (m, k), n = x.shape, weight.shape[0]
        self._gemm.launch(
            a=x.data_ptr(),
            weight=weight.data_ptr(),
            out=out.data_ptr(),
            m=m,
            n=n,
            k=k,
            bias=bias.data_ptr() if bias is not None else 0,
        )
