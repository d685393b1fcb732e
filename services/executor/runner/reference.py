"""The runner that tests measure the others by: torch, one chunk at a time, slow and plain.

Numerics follow the Hugging Face implementations: norms and softmax in float32, everything else
in the compute type. Torch's matrix products may round a row differently in another batch, so a
continuation is not byte-identical by construction.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from kernels import reference
from kernels.cpu.packing import unpack_gate_up, unpack_linear
from kvmanager.layout import F32, LOW32
from services.executor.modelstore.packed import PackedModel, TensorKind
from services.executor.runner.base import Chunk, Lane, Runner, StepResult

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ReferenceRunner(Runner):
    """dtype: of the arithmetic, `float32` or `bfloat16`. kv_dtype: of the pages; default: the same."""

    deterministic = False

    def __init__(self, model: PackedModel, dtype: str = "float32", kv_dtype: str | None = None) -> None:
        self._model = model
        self._spec = model.spec
        self._dtype = _TYPES[dtype]
        self._kv_dtype = _TYPES[kv_dtype or dtype]
        self._weights = {name: _load(model, name).to(self._dtype) for name in model.tensors}
        self._frequencies = torch.from_numpy(self._spec.inverse_frequencies())
        self._pool = torch.empty(0)
        self._page_size = 0

    def map_pool(self, pool: memoryview, pages: int, page_size: int) -> None:
        spec = self._spec
        shape = (pages, spec.layers, 2, spec.kv_heads, page_size, spec.head_dim)
        self._pool = torch.frombuffer(pool, dtype=self._kv_dtype, count=int(np.prod(shape))).view(shape)
        self._page_size = page_size

    def prepare(self, lane: Lane, known: int) -> None:
        """Rows are read afresh in each step: nothing to do."""

    def copy_slots(self, source: int, target: int, count: int) -> None:
        self._pool[target, ..., :count, :] = self._pool[source, ..., :count, :]

    def step(self, chunks: list[Chunk]) -> StepResult:
        tokens = np.zeros(len(chunks), np.uint32)
        logprobs = np.zeros(len(chunks), np.float32)
        for i, chunk in enumerate(chunks):
            hidden = self._forward(chunk)
            if chunk.sample:
                tokens[i], logprobs[i] = _sample(chunk, self._head(hidden[-1:])[0])
        return StepResult(tokens, logprobs)

    def logits(self, chunks: list[Chunk]) -> np.ndarray:
        return np.concatenate([self._head(self._forward(chunk)) for chunk in chunks])

    def close(self) -> None:
        self._weights = {}
        self._pool = torch.empty(0)

    @torch.inference_mode()
    def _head(self, hidden: torch.Tensor) -> F32:
        """hidden [n, hidden_size] -> float32 [n, vocab_size]."""
        logits: F32 = F.linear(hidden, self._weights["output_head"]).float().numpy()
        return logits

    @torch.inference_mode()
    def _forward(self, chunk: Chunk) -> torch.Tensor:
        """The final norm's output [count, hidden_size]; K/V of positions from `write_from` on are written."""
        spec, weights = self._spec, self._weights
        ids = torch.from_numpy(chunk.lane.tokens[chunk.start : chunk.start + chunk.count].astype(np.int64))
        positions = torch.arange(chunk.start, chunk.start + chunk.count)
        angles = positions[:, None].float() * self._frequencies
        cosine, sine = angles.cos().to(self._dtype), angles.sin().to(self._dtype)
        x = weights["output_head" if spec.tied_embeddings else "embedding"][ids]
        for i in range(spec.layers):
            name = f"layers.{i}.".__add__
            qkv = F.linear(
                self._norm(x, name("attention_norm")), weights[name("qkv")], weights.get(name("qkv_bias"))
            ).view(chunk.count, -1, spec.head_dim)
            q, k, v = torch.split(qkv, [spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
            if spec.qk_norm:
                q, k = self._norm(q, name("q_norm")), self._norm(k, name("k_norm"))
            q, k = _rotate(q, cosine, sine), _rotate(k, cosine, sine)
            self._append(chunk, i, k, v)
            attended = self._attend(chunk, i, q)
            x = x + F.linear(attended, weights[name("attention_output")])
            gate, up = F.linear(self._norm(x, name("mlp_norm")), weights[name("gate_up")]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, weights[name("down")])
        return self._norm(x, "final_norm")

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """RMSNorm over the last dimension, in float32."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._spec.rms_norm_eps)
        return self._weights[name] * wide.to(x.dtype)

    def _append(self, chunk: Chunk, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values [count, kv_heads, head_dim] into the slots of positions >= write_from."""
        first = max(chunk.write_from, chunk.start)
        positions = torch.arange(first, chunk.start + chunk.count)
        pages, slots = self._slots(chunk.lane, positions)
        skipped = first - chunk.start
        for half, new in enumerate((keys, values)):
            self._pool[pages, layer, half, :, slots] = new[skipped:].to(self._kv_dtype)

    def _attend(self, chunk: Chunk, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """queries [count, heads, head_dim] -> [count, heads * head_dim]; reads only what a query may see."""
        spec = self._spec
        end = chunk.start + chunk.count
        first = max(0, chunk.start + 1 - spec.sliding_window) if spec.sliding_window else 0
        seen = torch.arange(first, end)
        pages, slots = self._slots(chunk.lane, seen)
        group = spec.heads // spec.kv_heads
        keys, values = (
            self._pool[pages, layer, half, :, slots].to(self._dtype).repeat_interleave(group, dim=1) for half in (0, 1)
        )
        at = torch.arange(chunk.start, end)[:, None]
        visible = seen <= at
        if spec.sliding_window:
            visible &= seen > at - spec.sliding_window
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * spec.head_dim**-0.5
        if spec.logit_softcap:
            scores = spec.logit_softcap * torch.tanh(scores / spec.logit_softcap)
        scores = scores.masked_fill(~visible, float("-inf"))
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(self._dtype)
        return torch.einsum("hqk,khd->qhd", weights, values).reshape(chunk.count, -1)

    def _slots(self, lane: Lane, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The page and the slot in it of each position."""
        if lane.row is None:
            raise ValueError("the lane has no row")
        entries = torch.from_numpy((lane.row & np.uint64(LOW32)).astype(np.int64))
        return entries[positions // self._page_size], positions % self._page_size


def _sample(chunk: Chunk, logits: F32) -> reference.Sampled:
    """The token after the chunk. logits: float32 [vocab]."""
    lane, asked = chunk.lane, chunk.lane.sampling
    params = reference.Sampling(
        seed=asked.seed,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        output_index=lane.index,
        bias=dict(asked.logit_bias),
        suppressed=asked.suppressed,
        min_tokens=asked.min_tokens,
    )
    return reference.sample(logits, params, lane.tokens[: chunk.start + chunk.count].tolist(), lane.prompt_length)


def _load(model: PackedModel, name: str) -> torch.Tensor:
    """A tensor in its logical shape and float32; gate and up one below the other."""
    tensor = model.tensors[name]
    data = model.view(name)
    if tensor.kind is TensorKind.PACKED:
        data = unpack_linear(data, *tensor.shape).view(np.uint16)
    elif tensor.kind is TensorKind.GATE_UP:
        rows, columns = tensor.shape
        data = np.concatenate(unpack_gate_up(data, rows // 2, columns)).view(np.uint16)
    if tensor.kind is TensorKind.FLOAT32:
        return torch.from_numpy(data.astype(np.float32))
    return torch.from_numpy(data.astype(np.uint32) << 16).view(torch.float32)


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """x [count, heads, head_dim]; cosine, sine [count, head_dim / 2]. The halves of a head form the pairs."""
    low, high = x.chunk(2, dim=-1)
    cosine, sine = cosine[:, None], sine[:, None]
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)
