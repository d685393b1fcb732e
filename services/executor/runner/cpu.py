"""The native CPU runner: fills one array of chunks and makes one C call a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kernels.cpu.native import CHUNK, ModelShape, NativeModel, NativeSampling, SamplingFields
from kernels.cpu.pages import Planes
from kvmanager.layout import F32
from services.executor.modelstore.packed import PackedModel
from services.executor.runner.base import Chunk, DraftLimits, Drafts, Lane, Runner, StepResult

_MOST_DRAFTS: Final = 15
# Rows up to which one more costs little beside the weights, which are read once for all of them; and those up to which
# one still costs less than a token does without drafts, because tokens wait for keys, values and joins too.
_ROWS: Final = {"portable": (4, 0), "avx2": (12, 0), "avx512bf16": (12, 96), "amx": (64, 128)}


@dataclass(slots=True)
class _Prepared:
    """Addresses of what the library reads of a lane."""

    tokens: int
    row: int
    sampling: NativeSampling


class CpuRunner(Runner):
    """dtype: of the arithmetic. kv_dtype: of the pages. isa: None takes the best that the machine has."""

    deterministic = True

    def __init__(self, model: PackedModel, dtype: str, kv_dtype: str, threads: int, isa: str | None = None) -> None:
        spec = model.spec
        shape = ModelShape(
            layers=spec.layers,
            hidden=spec.hidden_size,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            intermediate=spec.intermediate_size,
            vocab=spec.vocab_size,
            max_positions=spec.max_position_embeddings,
            rms_norm_eps=spec.rms_norm_eps,
            sliding_window=spec.sliding_window,
            logit_softcap=spec.logit_softcap,
            tied_embeddings=spec.tied_embeddings,
            qkv_bias=spec.qkv_bias,
            qk_norm=spec.qk_norm,
        )
        compact = model.compact.views() if model.compact is not None else None
        self._native = NativeModel(
            shape, model.views(), spec.inverse_frequencies(), dtype, kv_dtype, threads, isa, compact=compact
        )
        self._spec = spec
        self._kv_dtype = kv_dtype
        self._planes: Planes | None = None
        self.isa = self._native.isa
        isa = "avx512bf16" if self.isa == "amx" and dtype != "bfloat16" else self.isa  # tiles multiply bfloat16
        self.drafts = DraftLimits(_MOST_DRAFTS, *_ROWS[isa])

    def map_pool(self, pool: memoryview, pages: int, page_size: int) -> None:
        spec = self._spec
        self._planes = Planes(pool, self._kv_dtype, pages, spec.layers, spec.kv_heads, page_size, spec.head_dim)
        self._native.map_pool(self._planes.bytes.ctypes.data, pages, page_size)

    def prepare(self, lane: Lane, known: int) -> None:
        if lane.row is None:
            raise ValueError("the lane has no row")
        asked = lane.sampling
        sampling = NativeSampling(
            SamplingFields(
                seed=asked.seed,
                temperature=asked.temperature,
                top_p=asked.top_p,
                min_p=asked.min_p,
                top_k=asked.top_k,
                repetition_penalty=asked.repetition_penalty,
                presence_penalty=asked.presence_penalty,
                frequency_penalty=asked.frequency_penalty,
                output_index=lane.index,
                prompt_length=lane.prompt_length,
                min_tokens=asked.min_tokens,
                logprobs=asked.logprobs,
                bias=asked.logit_bias,
                suppressed=asked.suppressed,
            )
        )
        lane.device = _Prepared(lane.tokens.ctypes.data, lane.row.ctypes.data, sampling)

    def copy_slots(self, source: int, target: int, count: int) -> None:
        assert self._planes is not None, "map_pool() comes before the first copy"
        self._planes.copy_slots(source, target, count)

    def step(self, chunks: list[Chunk]) -> StepResult:
        array = self._array(chunks)
        tokens, logprobs = np.zeros(len(chunks), np.uint32), np.zeros(len(chunks), np.float32)
        tried = np.array([chunk.drafts for chunk in chunks], np.uint32)
        total = 0
        if self.drafts is not None and tried.any():
            most = self.drafts.most(int(array["count"].sum()), int(tried.sum()))
            total = self._native.draft(array, tried, most)
        if not total:
            self._native.step(array, tokens, logprobs)
            return StepResult(tokens, logprobs)
        right, draft_logprobs = np.zeros(len(chunks), np.uint32), np.zeros(total, np.float32)
        self._native.step(array, tokens, logprobs, right, draft_logprobs)
        return StepResult(tokens, logprobs, Drafts(tried, right, draft_logprobs))

    def logits(self, chunks: list[Chunk]) -> F32:
        return self._native.logits(self._array(chunks))

    def close(self) -> None:
        self._native.close()

    @staticmethod
    def _array(chunks: list[Chunk]) -> np.ndarray:
        rows = []
        for lane, start, count, write_from, sample, _ in chunks:
            device = lane.device
            assert isinstance(device, _Prepared), "prepare() comes before the first step"
            rows.append((device.tokens, device.row, device.sampling.address, start, count, write_from, sample))
        return np.array(rows, CHUNK)
