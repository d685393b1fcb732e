"""One way to compile the kernels, and small models made for the native interface alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from kernels import reference
from kernels.cpu import native
from kernels.cpu.native import ModelShape, NativeModel, NativeSampling, SamplingFields
from kernels.cpu.packing import pack_gate_up, pack_linear
from tests.planes import to_planes, to_slots

SOURCE = Path(native.__file__).parent

PLAIN = SamplingFields(
    seed=0,
    temperature=0.0,
    top_p=1.0,
    min_p=0.0,
    top_k=0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    output_index=0,
    prompt_length=0,
    min_tokens=0,
    logprobs=True,
    bias=(),
    suppressed=(),
)
# Awkward on purpose: nothing is a multiple of a panel, and a head is not one of 16.
GROUPED = ModelShape(
    layers=2,
    hidden=72,
    heads=6,
    kv_heads=2,
    head_dim=40,
    intermediate=107,
    vocab=333,
    max_positions=256,
    rms_norm_eps=1e-5,
    sliding_window=0,
    logit_softcap=0.0,
    tied_embeddings=False,
    qkv_bias=True,
    qk_norm=True,
)
WINDOWED = replace(
    GROUPED,
    hidden=65,
    heads=3,
    kv_heads=3,
    head_dim=32,
    sliding_window=75,
    logit_softcap=20.0,
    tied_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
)


@dataclass(frozen=True)
class Variant:
    """An instruction set, in the installed library or in another."""

    isa: str
    shared_object: Path | None

    def model(
        self,
        shape: ModelShape,
        tensors: dict[str, np.ndarray],
        dtype: str,
        threads: int = 1,
        kv_dtype: str | None = None,
        compact: dict[str, np.ndarray] | None = None,
    ) -> NativeModel:
        """kv_dtype: default: the dtype."""
        frequencies = (10000.0 ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)).astype(np.float32)
        kv_dtype = kv_dtype or dtype
        return NativeModel(
            shape, tensors, frequencies, dtype, kv_dtype, threads, self.isa, self.shared_object, compact=compact
        )

    def attention(self, shape: ModelShape, dtype: str, kv_dtype: str, threads: int = 1) -> NativeModel:
        """A model that can only attend: no weights, no rotation."""
        still = np.zeros(shape.head_dim // 2, np.float32)
        return NativeModel(
            replace(shape, tied_embeddings=True),
            _HEADLESS,
            still,
            dtype,
            kv_dtype,
            threads,
            self.isa,
            self.shared_object,
        )

    def sampler(self, vocab: int) -> NativeModel:
        """A model that can only sample."""
        return self.attention(replace(GROUPED, layers=0, vocab=vocab), "float32", "float32")


_HEADLESS: dict[str, np.ndarray] = {"output_head": np.zeros(1, np.uint16), "final_norm": np.zeros(1, np.float32)}


def random_tensors(shape: ModelShape, seed: int = 1) -> dict[str, np.ndarray]:
    """Weights of a model whose logits are far from uniform."""
    rng = np.random.default_rng(seed)
    kv, heads = shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim

    def matrix(outputs: int, inputs: int) -> np.ndarray:
        return rng.normal(0, 1.5 / np.sqrt(inputs), (outputs, inputs)).astype(ml_dtypes.bfloat16)

    def scale(size: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    tensors = {"output_head": pack_linear(matrix(shape.vocab, shape.hidden)), "final_norm": scale(shape.hidden)}
    if not shape.tied_embeddings:
        tensors["embedding"] = matrix(shape.vocab, shape.hidden).view(np.uint16)
    for i in range(shape.layers):
        tensors |= {
            f"layers.{i}.attention_norm": scale(shape.hidden),
            f"layers.{i}.qkv": pack_linear(matrix(heads + 2 * kv, shape.hidden)),
            f"layers.{i}.attention_output": pack_linear(matrix(shape.hidden, heads)),
            f"layers.{i}.mlp_norm": scale(shape.hidden),
            f"layers.{i}.gate_up": pack_gate_up(
                matrix(shape.intermediate, shape.hidden), matrix(shape.intermediate, shape.hidden)
            ),
            f"layers.{i}.down": pack_linear(matrix(shape.hidden, shape.intermediate)),
        }
        if shape.qkv_bias:
            tensors[f"layers.{i}.qkv_bias"] = rng.normal(0, 0.2, heads + 2 * kv).astype(np.float32)
        if shape.qk_norm:
            tensors |= {f"layers.{i}.q_norm": scale(shape.head_dim), f"layers.{i}.k_norm": scale(shape.head_dim)}
    return tensors


def stored(values: np.ndarray, kv_dtype: str) -> np.ndarray:
    """Slots of pages that hold float32 values [..., head_dim]; int8 ones are uint8 [..., head_dim + 4]."""
    if kv_dtype == "int8":
        return reference.int8_slots(values)
    return values.astype(ml_dtypes.bfloat16 if kv_dtype == "bfloat16" else np.float32)


def unwritten(shape: tuple[int, ...], kv_dtype: str) -> np.ndarray:
    """The same that hold NaN."""
    slots = stored(np.zeros((1, shape[-1]), np.float32), kv_dtype)
    # NaN in both types, and as a scale.
    return np.full((*shape[:-1], slots.shape[-1] * slots.itemsize), 0xFF, np.uint8).view(slots.dtype)


class Pages:
    """A pool full of NaN, mapped by a model; pages are handed out in random order, never page 0."""

    def __init__(self, model: NativeModel, shape: ModelShape, kv_dtype: str, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self._order = np.random.default_rng(pages).permutation(np.arange(1, pages))
        self._next = 0
        dimensions = (pages, shape.layers, 2, shape.kv_heads, page_size, shape.head_dim)
        self.slots = unwritten(dimensions, kv_dtype)  # as they were at the last `read`
        self._head_dim = shape.head_dim
        self.planes = to_planes(self.slots)
        model.map_pool(self.planes.ctypes.data, pages, page_size)

    def read(self) -> np.ndarray:
        """Slots [pages, layers, k and v, kv_heads, page_size, …]."""
        self.slots = to_slots(self.planes, self.slots.dtype, self.page_size, self._head_dim)
        return self.slots

    def write(self, slots: np.ndarray) -> None:
        self.planes[...] = to_planes(slots)

    def row(self, capacity: int) -> np.ndarray:
        """A block table for `capacity` positions: page ids below random generations."""
        count = -(-capacity // self.page_size)
        ids = self._order[self._next : self._next + count].astype(np.uint64)
        assert len(ids) == count, "the pool is too small for this test"
        self._next += count
        return ids | (ids * np.uint64(7919) + np.uint64(3)) << np.uint64(32)

    def held(self, row: np.ndarray, length: int) -> np.ndarray:
        """What the pages hold for the positions [0, length), as bytes [length, layers, 2, kv_heads, …]."""
        positions = np.arange(length)
        ids = (row & np.uint64(0xFFFFFFFF)).astype(np.int64)[positions // self.page_size]
        return self.read()[ids, :, :, :, positions % self.page_size].view(np.uint8)


@dataclass
class Sequence:
    """Tokens and block table at fixed addresses, as chunks refer to them."""

    tokens: np.ndarray  # uint32 [length]
    row: np.ndarray  # uint64 [entries]
    sampling: NativeSampling

    def chunk(self, start: int, count: int, write_from: int | None = None, sample: bool = False) -> tuple[int, ...]:
        """A row of the CHUNK array."""
        addresses = (self.tokens.ctypes.data, self.row.ctypes.data, self.sampling.address)
        return (*addresses, start, count, start if write_from is None else write_from, int(sample))


def as_chunks(rows: list[tuple[int, ...]]) -> np.ndarray:
    return np.array(rows, native.CHUNK)
