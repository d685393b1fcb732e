"""One description of every decoder that Pagehold runs: Llama, Mistral, Qwen2 and Qwen3 are flags."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvmanager.layout import F32


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """The `llama3` rule: long wavelengths are stretched by `factor`, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Pre-norm transformer decoder: RMSNorm, rotary half-split attention, SiLU-gated MLP."""

    architecture: str  # "llama", "mistral", "qwen2", "qwen3"
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    sliding_window: int = 0  # tokens that a query sees, itself included; 0: all
    logit_softcap: float = 0.0  # on attention scores; 0: none

    def inverse_frequencies(self) -> F32:
        """float32 [head_dim / 2], as transformers computes them (`modeling_rope_utils`)."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        inverse: F32 = (1.0 / np.power(np.float32(self.rope_theta), exponents)).astype(np.float32)
        scaling = self.rope_scaling
        if scaling is None:
            return inverse
        wavelength = 2 * np.pi / inverse
        low = scaling.original_max_position_embeddings / scaling.low_freq_factor
        high = scaling.original_max_position_embeddings / scaling.high_freq_factor
        smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        blended = (1 - smooth) * inverse / scaling.factor + smooth * inverse
        scaled = np.where(wavelength > low, inverse / scaling.factor, blended)
        result: F32 = np.where(wavelength < high, inverse, scaled).astype(np.float32)
        return result
