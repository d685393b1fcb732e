"""A packed model's tensors on the device, as torch's matrix products want them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import structlog
import torch

from kernels.cpu.packing import PANEL
from services.executor.modelstore.packed import PackedModel, Tensor, TensorKind
from services.executor.runner.cuda.platform import Platform
from services.executor.runner.cuda.uploads import Uploads

log = structlog.get_logger()

TORCH_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

_LOG_EVERY = 4 << 30  # bytes between two words about the progress
_CHUNK = 32 << 20


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's. Matrices are [outputs, inputs] in the compute type."""

    attention_norm: torch.Tensor  # float32 [hidden]
    qkv: torch.Tensor  # [(heads + 2 kv_heads) * head_dim, hidden]
    qkv_bias: torch.Tensor | None  # [(heads + 2 kv_heads) * head_dim]
    q_norm: torch.Tensor | None  # float32 [head_dim]
    k_norm: torch.Tensor | None  # float32 [head_dim]
    attention_output: torch.Tensor  # [hidden, heads * head_dim]
    mlp_norm: torch.Tensor  # float32 [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden], gate first
    down: torch.Tensor  # [hidden, intermediate]


@dataclass(frozen=True, slots=True)
class Weights:
    """All of a model's. A tied model's `embedding` is its `output_head`."""

    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # float32 [hidden]
    output_head: torch.Tensor  # [vocab, hidden]

    def __repr__(self) -> str:
        return f"Weights({len(self.layers)} layers)"


def load_weights(model: PackedModel, dtype: str, platform: Platform) -> Weights:
    """One tensor at a time, inside the platform's stream; the largest is on the device twice for a moment."""
    loader = _Loader(model, TORCH_TYPES[dtype], platform)
    head = loader.matrix("output_head")
    return Weights(
        embedding=head if model.spec.tied_embeddings else loader.matrix("embedding"),
        layers=tuple(_layer(loader, f"layers.{i}.") for i in range(model.spec.layers)),
        final_norm=loader.vector("final_norm"),
        output_head=head,
    )


def _layer(loader: _Loader, prefix: str) -> LayerWeights:
    def optional(name: str) -> torch.Tensor | None:
        return loader.vector(prefix + name) if prefix + name in loader.model.tensors else None

    return LayerWeights(
        attention_norm=loader.vector(prefix + "attention_norm"),
        qkv=loader.matrix(prefix + "qkv"),
        qkv_bias=None if (bias := optional("qkv_bias")) is None else bias.to(loader.dtype),
        q_norm=optional("q_norm"),
        k_norm=optional("k_norm"),
        attention_output=loader.matrix(prefix + "attention_output"),
        mlp_norm=loader.vector(prefix + "mlp_norm"),
        gate_up=loader.matrix(prefix + "gate_up"),
        down=loader.matrix(prefix + "down"),
    )


class _Loader:
    def __init__(self, model: PackedModel, dtype: torch.dtype, platform: Platform) -> None:
        self.model = model
        self.dtype = dtype
        self._device = platform.torch_device
        self._uploads = Uploads(platform, _CHUNK, buffers=3)
        self._total = sum(tensor.nbytes for tensor in model.tensors.values())
        self._done = 0

    def matrix(self, name: str) -> torch.Tensor:
        """In the compute type, row-major without the padding of panels."""
        tensor = self.model.tensors[name]
        bits = self._upload(name).view(torch.int16)
        matrix = bits.view(tensor.shape) if tensor.kind is TensorKind.BFLOAT16 else _unpack(bits, tensor)
        return matrix.view(torch.bfloat16).to(self.dtype)

    def vector(self, name: str) -> torch.Tensor:
        """float32 as in the file."""
        return self._upload(name).view(torch.float32)

    def _upload(self, name: str) -> torch.Tensor:
        """Its bytes. One piece is read from the file while those before it travel."""
        data = self.model.view(name).reshape(-1).view(np.uint8)
        target = torch.empty(data.nbytes, dtype=torch.uint8, device=self._device)
        for start in range(0, data.nbytes, _CHUNK):
            self._uploads.copy(data[start : start + _CHUNK], target[start:])
        before, self._done = self._done, self._done + data.nbytes
        if before // _LOG_EVERY != self._done // _LOG_EVERY:
            log.info("loading weights", gib=round(self._done / 2**30, 1), of=round(self._total / 2**30, 1))
        return target


def _unpack(bits: torch.Tensor, tensor: Tensor) -> torch.Tensor:
    """Panels [N/32][gate, up][K/2][32][2], or without the second dimension, to [rows, columns]; see `packing`."""
    rows, columns = tensor.shape
    parts = 2 if tensor.kind is TensorKind.GATE_UP else 1
    outputs, pairs = rows // parts, (columns + 1) // 2
    panels = bits.view(-1, parts, pairs, PANEL, 2).permute(1, 0, 3, 2, 4).reshape(parts, -1, 2 * pairs)
    return panels[:, :outputs, :columns].reshape(rows, columns).contiguous()
