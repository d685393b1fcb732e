"""The decoder over the tokens of one step: every tensor is allocated once, every launch can be captured.

Rounding follows the Hugging Face implementations, as the reference runner does: the residual, the norms' outputs and
everything between the products are rounded to the compute type.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kernels.cuda.activation import SiluMul
from kernels.cuda.elements import Dtype, KvDtype
from kernels.cuda.norm import Norms
from kernels.cuda.rope import RopeAppend
from kernels.cuda.sampling import Sampler
from services.executor.modelstore.spec import DecoderSpec
from services.executor.runner.cuda.attention import Attention
from services.executor.runner.cuda.lanes import Lanes
from services.executor.runner.cuda.platform import Platform
from services.executor.runner.cuda.pool import Pool
from services.executor.runner.cuda.products import Products
from services.executor.runner.cuda.staging import DeviceStep
from services.executor.runner.cuda.weights import TORCH_TYPES, Weights


@dataclass(frozen=True, slots=True)
class _Activations:
    """Between the layers of a step. [tokens, ...] in the compute type."""

    ids: torch.Tensor  # int32 [tokens]
    residual: torch.Tensor  # [hidden]
    normed: torch.Tensor  # [hidden]
    update: torch.Tensor  # [hidden], what is added to the residual
    qkv: torch.Tensor  # [(heads + 2 kv_heads) * head_dim]
    queries: torch.Tensor  # [heads * head_dim], rotated
    attended: torch.Tensor  # [heads * head_dim]
    gate_up: torch.Tensor  # [2 * intermediate]
    middle: torch.Tensor  # [intermediate]

    def first(self, tokens: int) -> _Activations:
        return _Activations(
            self.ids[:tokens],
            self.residual[:tokens],
            self.normed[:tokens],
            self.update[:tokens],
            self.qkv[:tokens],
            self.queries[:tokens],
            self.attended[:tokens],
            self.gate_up[:tokens],
            self.middle[:tokens],
        )


def _allocate(spec: DecoderSpec, tokens: int, dtype: torch.dtype, device: torch.device) -> _Activations:
    def rows(width: int) -> torch.Tensor:
        return torch.zeros(tokens, width, dtype=dtype, device=device)

    attended = spec.heads * spec.head_dim
    return _Activations(
        ids=torch.zeros(tokens, dtype=torch.int32, device=device),
        residual=rows(spec.hidden_size),
        normed=rows(spec.hidden_size),
        update=rows(spec.hidden_size),
        qkv=rows(attended + 2 * spec.kv_heads * spec.head_dim),
        queries=rows(attended),
        attended=rows(attended),
        gate_up=rows(2 * spec.intermediate_size),
        middle=rows(spec.intermediate_size),
    )


class Decoder:
    """max_tokens, max_rows: of a step, computed and sampled. Everything is enqueued on the stream in use."""

    def __init__(
        self,
        platform: Platform,
        spec: DecoderSpec,
        weights: Weights,
        lanes: Lanes,
        attention: Attention,
        products: Products,
        *,
        dtype: Dtype,
        kv_dtype: KvDtype,
        page_size: int,
        max_tokens: int,
        max_rows: int,
    ) -> None:
        device, where = platform.device, platform.torch_device
        self._spec, self._weights, self._lanes = spec, weights, lanes
        self._attention, self._products = attention, products
        self._norms = Norms(device, spec.hidden_size, dtype, spec.rms_norm_eps)
        self._rope = RopeAppend(
            device,
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            page_size,
            dtype,
            kv_dtype,
            spec.qk_norm,
            spec.rms_norm_eps,
        )
        self._silu_mul = SiluMul(device, spec.intermediate_size, dtype)
        self._sampler = Sampler(device, spec.vocab_size, dtype)
        self._cosines, self._sines = _rotations(spec, lanes.stride, where)
        self._activations = _allocate(spec, max_tokens, TORCH_TYPES[dtype], where)
        self._picked = torch.zeros(max_rows, spec.hidden_size, dtype=TORCH_TYPES[dtype], device=where)
        self._scratch = torch.zeros(self._sampler.scratch_bytes(max_rows), dtype=torch.uint8, device=where)
        self.logits = torch.zeros(max_rows, spec.vocab_size, dtype=TORCH_TYPES[dtype], device=where)
        # Tokens, and the bits of their log-probabilities.
        self.results = torch.zeros(2, max_rows, dtype=torch.int32, device=where)

    def step(self, step: DeviceStep, pool: Pool) -> None:
        """Computes the step's tokens and samples its rows: `results` and the history."""
        rows = step.rows
        normed = self.forward(step, pool)
        picked = self._picked[:rows]
        torch.index_select(normed, 0, step.sample_rows, out=picked)
        logits = self.logits[:rows]
        self._products.linear(picked, self._weights.output_head, logits)
        lanes = self._lanes
        self._sampler.launch(
            logits=logits.data_ptr(),
            row_stride=self._spec.vocab_size,
            samples=step.samples.data_ptr(),
            params=lanes.params.data_ptr(),
            bias_ids=lanes.bias_ids,
            bias_values=lanes.bias_values,
            suppressed_ids=lanes.suppressed_ids,
            history=lanes.history.data_ptr(),
            history_stride=lanes.stride,
            scratch=self._scratch.data_ptr(),
            tokens_out=self.results[0].data_ptr(),
            logprobs_out=self.results[1].data_ptr(),
            rows=rows,
        )

    def head(self, normed: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocab] of so many rows of the final norm's output; overwritten by the next call."""
        logits = self.logits[: len(normed)]
        self._products.linear(normed, self._weights.output_head, logits)
        return logits

    def forward(self, step: DeviceStep, pool: Pool) -> torch.Tensor:
        """The final norm's output [tokens, hidden]; K and V go into the pages. Overwritten by the next call."""
        tokens = step.tokens
        weights, norms, linear = self._weights, self._norms, self._products.linear
        a = self._activations.first(tokens)
        residual, normed, update = a.residual.data_ptr(), a.normed.data_ptr(), a.update.data_ptr()
        torch.index_select(self._lanes.history.view(-1), 0, step.token_index, out=a.ids)
        torch.index_select(weights.embedding, 0, a.ids, out=a.residual)
        norms.rms_norm(residual, weights.layers[0].attention_norm.data_ptr(), normed, tokens)
        for i, layer in enumerate(weights.layers):
            linear(a.normed, layer.qkv, a.qkv, layer.qkv_bias)
            self._rope.launch(
                qkv=a.qkv.data_ptr(),
                q_out=a.queries.data_ptr(),
                cosines=self._cosines.data_ptr(),
                sines=self._sines.data_ptr(),
                positions=step.positions.data_ptr(),
                slots=step.kv_slots.data_ptr(),
                pool=pool.layer(i),
                page_stride=pool.strides.page,
                half_stride=pool.strides.half,
                k_scale=pool.k_scale(i),
                v_scale=pool.v_scale(i),
                q_norm=_pointer(layer.q_norm),
                k_norm=_pointer(layer.k_norm),
                tokens=tokens,
            )
            self._attention.launch(step, pool, i, a.queries.data_ptr(), a.attended.data_ptr())
            linear(a.attended, layer.attention_output, a.update)
            norms.add_rms_norm(update, residual, layer.mlp_norm.data_ptr(), normed, tokens)
            linear(a.normed, layer.gate_up, a.gate_up)
            self._silu_mul.launch(a.gate_up.data_ptr(), a.middle.data_ptr(), tokens)
            linear(a.middle, layer.down, a.update)
            following = weights.layers[i + 1].attention_norm if i + 1 < len(weights.layers) else weights.final_norm
            norms.add_rms_norm(update, residual, following.data_ptr(), normed, tokens)
        return a.normed


def _pointer(tensor: torch.Tensor | None) -> int:
    return tensor.data_ptr() if tensor is not None else 0


def _rotations(spec: DecoderSpec, positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 [positions, head_dim / 2]."""
    angles = np.arange(positions, dtype=np.float32)[:, None] * spec.inverse_frequencies()
    return torch.from_numpy(np.cos(angles)).to(device), torch.from_numpy(np.sin(angles)).to(device)
