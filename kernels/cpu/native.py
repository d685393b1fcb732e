"""The native library through ctypes: structs as in abi.h, and one class for a model that can step."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

ABI_VERSION: Final = 9


class NativeError(Exception):
    """The library is missing, does not fit, or ran out of memory; the message says what to do."""


_KV_TYPES: Final = {"float32": 0, "bfloat16": 1, "int8": 2}
# By the element type in which a packed matrix is viewed: bfloat16 panels, blocks of int8 or int4, integers, blocks of
# integers of 8 or 4 bits.
_ENCODINGS: Final = {
    np.dtype(kind): code for code, kind in enumerate((np.uint16, np.int8, np.uint8, np.uint32, np.int32, np.int64))
}


class _Matrix(Structure):
    _fields_ = [("panels", c_void_p), ("encoding", c_uint32), ("unused", c_uint32)]


class _Layer(Structure):
    _fields_ = [
        ("attention_norm", c_void_p),
        ("qkv", _Matrix),
        *((name, c_void_p) for name in ("qkv_bias", "q_norm", "k_norm")),
        ("attention_output", _Matrix),
        ("mlp_norm", c_void_p),
        ("gate_up", _Matrix),
        ("down", _Matrix),
    ]


Tensors = dict[str, npt.NDArray[np.generic]]  # by the names of a packed model


def _layers(tensors: Tensors, count: int) -> ctypes.Array[_Layer]:
    layers = (_Layer * count)()
    for number, layer in enumerate(layers):
        for name, kind, *_ in _Layer._fields_:
            tensor = tensors.get(f"layers.{number}.{name}")
            if tensor is not None:
                setattr(layer, name, _matrix(tensor) if kind is _Matrix else tensor.ctypes.data)
    return layers


def _matrix(tensor: npt.NDArray[np.generic]) -> _Matrix:
    return _Matrix(panels=tensor.ctypes.data, encoding=_ENCODINGS[tensor.dtype])


class _Model(Structure):
    _fields_ = [
        *((name, c_uint32) for name in ("abi_version", "model_size", "chunk_size", "sampling_size")),
        *((name, c_uint32) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, c_uint32) for name in ("intermediate", "vocab", "max_positions", "sliding_window")),
        *((name, c_float) for name in ("rms_norm_eps", "logit_softcap")),
        *((name, c_uint32) for name in ("kv_type", "bfloat16_inputs")),
        *((name, c_void_p) for name in ("rope_cos", "rope_sin", "embedding")),
        ("output_head", _Matrix),
        *((name, c_void_p) for name in ("final_norm", "layer")),
        ("compact_head", _Matrix),
        ("compact_layer", c_void_p),
    ]


class _Sampling(Structure):
    _fields_ = [
        ("seed", c_uint64),
        *((name, c_float) for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
        *((name, c_float) for name in ("presence_penalty", "frequency_penalty")),
        *((name, c_uint32) for name in ("top_k", "output_index", "prompt_length", "min_tokens", "want_logprob")),
        *((name, c_uint32) for name in ("biases", "suppressed")),
        *((name, c_void_p) for name in ("bias_ids", "bias_values", "suppressed_ids")),
    ]


class _Pool(Structure):
    _fields_ = [("base", c_void_p), ("pages", c_uint64), ("page_size", c_uint32)]


# One row of the chunk array that a step takes; the same layout as PhChunk.
CHUNK: Final = np.dtype(
    [
        ("tokens", np.uint64),
        ("row", np.uint64),
        ("sampling", np.uint64),
        ("start", np.uint32),
        ("count", np.uint32),
        ("write_from", np.uint32),
        ("sample", np.uint32),
    ]
)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the kernels need to know of a decoder."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    rms_norm_eps: float
    sliding_window: int
    logit_softcap: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool


@dataclass(frozen=True, slots=True)
class SamplingFields:
    """Resolved sampling of one sequence; arrays are kept alive by `NativeSampling`."""

    seed: int
    temperature: float
    top_p: float
    min_p: float
    top_k: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    output_index: int
    prompt_length: int
    min_tokens: int
    logprobs: bool
    bias: tuple[tuple[int, float], ...]
    suppressed: tuple[int, ...]


class NativeSampling:
    """One sequence's sampling as the library reads it, at a fixed address."""

    __slots__ = ("_arrays", "_struct", "address")

    def __init__(self, fields: SamplingFields) -> None:
        ids = np.array([v for v, _ in fields.bias], np.uint32)
        values = np.array([value for _, value in fields.bias], np.float32)
        suppressed = np.array(fields.suppressed, np.uint32)
        self._arrays = (ids, values, suppressed)
        self._struct = _Sampling(
            seed=fields.seed,
            temperature=fields.temperature,
            top_p=fields.top_p,
            min_p=fields.min_p,
            repetition_penalty=fields.repetition_penalty,
            presence_penalty=fields.presence_penalty,
            frequency_penalty=fields.frequency_penalty,
            top_k=fields.top_k,
            output_index=fields.output_index,
            prompt_length=fields.prompt_length,
            min_tokens=fields.min_tokens,
            want_logprob=fields.logprobs,
            biases=len(ids),
            suppressed=len(suppressed),
            bias_ids=ids.ctypes.data,
            bias_values=values.ctypes.data,
            suppressed_ids=suppressed.ctypes.data,
        )
        self.address = ctypes.addressof(self._struct)


@cache
def library(path: Path | None = None) -> Any:
    """The shared library, built by the package. Raises NativeError."""
    path = path or Path(__file__).parent / "libpagehold_cpu.so"
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"the native kernels cannot be loaded ({path.name}): run `pip install .` again") from error
    pointer, number = c_void_p, c_uint32
    functions: dict[str, tuple[Any, list[Any]]] = {
        "pagehold_create": (pointer, [pointer, number, c_char_p, POINTER(c_char_p)]),
        "pagehold_destroy": (None, [pointer]),
        "pagehold_map_pool": (None, [pointer, pointer]),
        "pagehold_isas": (c_char_p, []),
        "pagehold_isa": (c_char_p, [pointer]),
        "pagehold_step": (c_int, [pointer, pointer, number, *[pointer] * 5]),
        "pagehold_draft": (c_int, [pointer, number, pointer, number]),
        "pagehold_attend": (c_int, [pointer, number, pointer, number, pointer, pointer]),
        "pagehold_sample": (c_int, [pointer, pointer, pointer, pointer, number, pointer, pointer]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(loaded, name, None)
        if function is None:
            raise NativeError(f"{path.name} is of another version than the Python package: run `pip install .` again")
        function.restype, function.argtypes = result, arguments
    return loaded


def available_isas(library_path: Path | None = None) -> list[str]:
    """Instruction sets that this machine can run, the plainest first."""
    return str(library(library_path).pagehold_isas().decode()).split()


class NativeModel:
    """A model ready to step. Tensors and tables are referenced, not copied: the caller's mapping must live."""

    def __init__(
        self,
        shape: ModelShape,
        tensors: Tensors,
        inverse_frequencies: npt.NDArray[np.float32],
        dtype: str,
        kv_dtype: str,
        threads: int,
        isa: str | None = None,
        library_path: Path | None = None,
        compact: Tensors | None = None,
    ) -> None:
        """tensors: by the names of a packed model, in place: bfloat16 panels as uint16, int8 blocks as int8, int4
        blocks as uint8, integers as uint32, blocks of integers as int32 or int64. kv_dtype: of the pages, float32,
        bfloat16 or int8. compact: the same values in fewer bytes, for steps of few rows. Raises NativeError.
        """
        self._library = library(library_path)
        angles = np.arange(shape.max_positions, dtype=np.float32)[:, None] * inverse_frequencies
        cosine, sine = np.cos(angles), np.sin(angles)
        layers = _layers(tensors, shape.layers)
        compact_layers = None if compact is None else _layers(compact, shape.layers)
        self._kept = (tensors, compact, cosine, sine, layers, compact_layers)
        model = _Model(
            abi_version=ABI_VERSION,
            model_size=ctypes.sizeof(_Model),
            chunk_size=CHUNK.itemsize,
            sampling_size=ctypes.sizeof(_Sampling),
            layers=shape.layers,
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=shape.intermediate,
            vocab=shape.vocab,
            max_positions=shape.max_positions,
            sliding_window=shape.sliding_window,
            rms_norm_eps=shape.rms_norm_eps,
            logit_softcap=shape.logit_softcap,
            kv_type=_KV_TYPES[kv_dtype],
            bfloat16_inputs=dtype == "bfloat16",
            rope_cos=cosine.ctypes.data,
            rope_sin=sine.ctypes.data,
            embedding=None if shape.tied_embeddings else tensors["embedding"].ctypes.data,
            output_head=_matrix(tensors["output_head"]),
            final_norm=tensors["final_norm"].ctypes.data,
            layer=ctypes.addressof(layers),
        )
        if compact is not None and compact_layers is not None:
            model.compact_head = _matrix(compact["output_head"])
            model.compact_layer = ctypes.addressof(compact_layers)
        error = c_char_p()
        self._engine = self._library.pagehold_create(byref(model), threads, isa.encode() if isa else None, byref(error))
        if not self._engine:
            message = error.value.decode() if error.value else "unknown"
            raise NativeError(
                f"{message} (asked for {isa}, this machine has {', '.join(available_isas(library_path))})"
            )
        self.isa = str(self._library.pagehold_isa(self._engine).decode())
        self._shape = shape

    def map_pool(self, address: int, pages: int, page_size: int) -> None:
        """address: of [pages][layer][k, v][kv_head] planes, see pages.py. page_size: a multiple of 4."""
        self._library.pagehold_map_pool(self._engine, byref(_Pool(base=address, pages=pages, page_size=page_size)))

    def step(
        self,
        chunks: npt.NDArray[np.void],
        tokens: npt.NDArray[np.uint32],
        logprobs: npt.NDArray[np.float32],
        accepted: npt.NDArray[np.uint32] | None = None,
        draft_logprobs: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """chunks: CHUNK [n]; tokens, logprobs: [n], written. Raises NativeError when memory runs out.

        With drafts also accepted: [n], and draft_logprobs: [drafts]; see abi.h.
        """
        self._step(chunks, tokens, logprobs, accepted, draft_logprobs, None)

    def logits(self, chunks: npt.NDArray[np.void]) -> npt.NDArray[np.float32]:
        """Like `step`, with the logits of every position: float32 [positions, vocab]."""
        tokens, logprobs = np.zeros(len(chunks), np.uint32), np.zeros(len(chunks), np.float32)
        out = np.empty((int(chunks["count"].sum()), self._shape.vocab), np.float32)
        self._step(chunks, tokens, logprobs, None, None, out)
        return out

    def _step(self, chunks: npt.NDArray[np.void], *results: npt.NDArray[Any] | None) -> None:
        addresses = [None if array is None else array.ctypes.data for array in results]
        if self._library.pagehold_step(self._engine, chunks.ctypes.data, len(chunks), *addresses):
            raise NativeError("out of memory in a step")

    def draft(self, chunks: npt.NDArray[np.void], drafts: npt.NDArray[np.uint32], room: int) -> int:
        """Puts drafts behind chunks that sample one token; how many in all.

        drafts: [n], how many each may get, and then how many it has got; room: all together.
        """
        if self._library.pagehold_draft(chunks.ctypes.data, len(chunks), drafts.ctypes.data, room):
            raise NativeError("out of memory in a step")
        return int(drafts.sum())

    def attend(self, layer: int, chunks: npt.NDArray[np.void], qkv: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """For tests: norm, rotary, append and attention of one layer.

        qkv: [positions, (heads + 2 kv_heads) * head_dim]. Returns [positions, heads * head_dim].
        """
        assert qkv.flags.c_contiguous and qkv.dtype == np.float32
        out = np.empty((len(qkv), self._shape.heads * self._shape.head_dim), np.float32)
        if self._library.pagehold_attend(
            self._engine, layer, chunks.ctypes.data, len(chunks), qkv.ctypes.data, out.ctypes.data
        ):
            raise NativeError("out of memory in a step")
        return out

    def sample(
        self, logits: npt.NDArray[np.float32], sampling: NativeSampling, tokens: npt.NDArray[np.uint32]
    ) -> tuple[int, float]:
        """For tests: the token after `tokens` and its log-probability. logits: [vocab]."""
        scratch, token, logprob = logits.astype(np.float32), c_uint32(), c_float()
        if self._library.pagehold_sample(
            self._engine,
            scratch.ctypes.data,
            sampling.address,
            tokens.ctypes.data,
            len(tokens),
            byref(token),
            byref(logprob),
        ):
            raise NativeError("out of memory in a step")
        return token.value, logprob.value

    def close(self) -> None:
        if self._engine:
            self._library.pagehold_destroy(self._engine)
            self._engine = None
