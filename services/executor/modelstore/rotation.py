"""A checkpoint that computes the same, with activations that are easier to round to 8 bits.

A few channels of a decoder's activations are many times as large as the others, and a row that is rounded by its
largest value leaves the others little. Rotated by a Hadamard matrix, each channel is a sum of many, and all are about
as large (Ashkboos et al., QuaRot, 2024). The rotation of the residual stream is hidden in the weights at both its ends,
with the norms' weights, since an RMSNorm without weights does not see it; that of a head's values likewise. That of
what `down` takes the kernels do: `kernels.cpu.integers`.
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np

from kernels.cpu.integers import F32, counter_rotate, hadamard
from services.executor.modelstore.checkpoint import BF16, Checkpoint, Part

_NORM_OF = {
    Part.QUERY: Part.ATTENTION_NORM,
    Part.KEY: Part.ATTENTION_NORM,
    Part.VALUE: Part.ATTENTION_NORM,
    Part.GATE: Part.MLP_NORM,
    Part.UP: Part.MLP_NORM,
    Part.HEAD: Part.FINAL_NORM,
}


class RotatedCheckpoint(Checkpoint):
    """The embedding and the output head are two, for only the latter takes a norm's weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._head = Part.EMBEDDING if checkpoint.spec.tied_embeddings else Part.HEAD
        self.spec = replace(checkpoint.spec, tied_embeddings=False)
        self.tokens = checkpoint.tokens

    def read(self, part: Part, layer: int | None = None) -> BF16:
        values = self._read(part, layer)
        head_dim = self.spec.head_dim
        match part:
            case Part.FINAL_NORM | Part.ATTENTION_NORM | Part.MLP_NORM:
                values = np.ones_like(values)
            case Part.EMBEDDING:
                values = _rotated(values, values.shape[-1])
            case Part.QUERY | Part.KEY | Part.VALUE | Part.GATE | Part.UP | Part.HEAD:
                norm = self._read(_NORM_OF[part], None if part is Part.HEAD else layer)
                values = _rotated(values * norm, values.shape[-1])
                if part is Part.VALUE:
                    values = _rotated(values.T, head_dim).T
            case Part.VALUE_BIAS:
                values = _rotated(values, head_dim)
            case Part.ATTENTION_OUTPUT:
                values = _rotated(_rotated(values, head_dim).T, len(values)).T
            case Part.DOWN:
                values = _rotated(counter_rotate(values).T, len(values)).T
        return np.ascontiguousarray(values).astype(ml_dtypes.bfloat16)

    def _read(self, part: Part, layer: int | None) -> F32:
        return self._checkpoint.read(self._head if part is Part.HEAD else part, layer).astype(np.float32)


def _rotated(values: F32, size: int) -> F32:
    """values [..., k * size]: each `size` of them in groups of the largest power of two that divides it."""
    width = size & -size
    if width == 1:
        return values
    spread: F32 = hadamard(values.reshape(*values.shape[:-1], -1, width, 1)) / np.sqrt(np.float32(width))
    return spread.reshape(values.shape)
