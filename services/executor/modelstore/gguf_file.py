"""Models in a GGUF file: metadata to a decoder description, quantized blocks as they are or as bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt

from kernels.cpu.blocks import BLOCK, Blocks, Float16
from services.executor.modelstore.checkpoint import BF16, Checkpoint, Part, round_to_bfloat16
from services.executor.modelstore.config import ARCHITECTURES, check_spec
from services.executor.modelstore.errors import ModelError
from services.executor.modelstore.gguf_tokenizer import read_tokens
from services.executor.modelstore.spec import DecoderSpec, Llama3RopeScaling

_NAMES: Final = {
    Part.EMBEDDING: "token_embd.weight",
    Part.HEAD: "output.weight",
    Part.FINAL_NORM: "output_norm.weight",
    Part.ATTENTION_NORM: "blk.{}.attn_norm.weight",
    Part.QUERY: "blk.{}.attn_q.weight",
    Part.KEY: "blk.{}.attn_k.weight",
    Part.VALUE: "blk.{}.attn_v.weight",
    Part.QUERY_BIAS: "blk.{}.attn_q.bias",
    Part.KEY_BIAS: "blk.{}.attn_k.bias",
    Part.VALUE_BIAS: "blk.{}.attn_v.bias",
    Part.QUERY_NORM: "blk.{}.attn_q_norm.weight",
    Part.KEY_NORM: "blk.{}.attn_k_norm.weight",
    Part.ATTENTION_OUTPUT: "blk.{}.attn_output.weight",
    Part.MLP_NORM: "blk.{}.ffn_norm.weight",
    Part.GATE: "blk.{}.ffn_gate.weight",
    Part.UP: "blk.{}.ffn_up.weight",
    Part.DOWN: "blk.{}.ffn_down.weight",
}
_ROPE_FACTORS: Final = "rope_freqs.weight"


class Metadata:
    """The key-value part of a GGUF file, with typed access."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self._fields = reader.fields

    def get(self, key: str) -> Any:
        """The value (a list for an array), or None."""
        field = self._fields.get(key)
        return None if field is None else field.contents()

    def number(self, key: str, default: int | float | None = None) -> int | float:
        value = self.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"the GGUF file's {key} is {_kind(value)}, want one number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not isinstance(value, int) or value <= 0:
            raise ModelError(f"the GGUF file's {key} is {value!r}, want a positive whole number")
        return value


def _kind(value: object) -> str:
    return "missing" if value is None else type(value).__name__


_BLOCK_BYTES: Final = {
    gguf.GGMLQuantizationType.Q4_0: 18,
    gguf.GGMLQuantizationType.Q4_1: 20,
    gguf.GGMLQuantizationType.Q8_0: 34,
}


class GgufCheckpoint(Checkpoint):
    """One `.gguf` file with a decoder and its tokenizer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} is not a readable GGUF file: {error}") from error
        metadata = Metadata(reader)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.spec = self._read_spec(metadata)
        self.tokens = read_tokens(metadata.get)

    def read(self, part: Part, layer: int | None = None) -> BF16:
        values = self._decode(_NAMES[part].format(layer))
        order = self._order(part, len(values))
        return round_to_bfloat16(values if order is None else values[order])

    def blocks(self, part: Part, layer: int | None = None) -> Blocks | None:
        tensor = self._tensors.get(_NAMES[part].format(layer))
        if tensor is None or tensor.tensor_type not in _BLOCK_BYTES:
            return None
        found = _blocks(tensor.data, tensor.tensor_type)
        order = self._order(part, found.shape[0])
        return found if order is None else found.rows(order)

    def _order(self, part: Part, rows: int) -> npt.NDArray[np.intp] | None:
        """llama.cpp rotates neighbours, so its converter interleaves the halves of these heads."""
        if self.spec.architecture != "llama":
            return None
        if part in (Part.QUERY, Part.QUERY_BIAS):
            return _halves(rows, self.spec.heads)
        if part in (Part.KEY, Part.KEY_BIAS):
            return _halves(rows, self.spec.kv_heads)
        return None

    def _decode(self, name: str) -> npt.NDArray[np.float32]:
        """float32, of the shape the file names."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelError(f"{self._path} has no tensor {name}")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise ModelError(f"unsupported quantization {tensor.tensor_type.name} of {name} in {self._path}") from error
        return values.reshape(shape)

    def _read_spec(self, metadata: Metadata) -> DecoderSpec:
        architecture = metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise ModelError(f"unsupported architecture {architecture!r}; Pagehold runs {', '.join(ARCHITECTURES)}")

        def key(name: str) -> str:
            return f"{architecture}.{name}"

        if metadata.number(key("expert_count"), 0):
            raise ModelError("unsupported: mixture of experts")
        if "blk.0.attn_output.bias" in self._tensors or "blk.0.ffn_down.bias" in self._tensors:
            raise ModelError("unsupported: biases on the attention output or the MLP")
        hidden_size, heads = metadata.count(key("embedding_length")), metadata.count(key("attention.head_count"))
        head_dim = metadata.count(key("attention.key_length"), hidden_size // heads)
        if metadata.count(key("attention.value_length"), head_dim) != head_dim:
            raise ModelError("unsupported: keys and values of different sizes")
        if metadata.count(key("rope.dimension_count"), head_dim) != head_dim:
            raise ModelError("unsupported: rotary embedding over a part of the head")
        scaling_type = metadata.get(key("rope.scaling.type"))
        if scaling_type not in (None, "none"):
            raise ModelError(f"unsupported rotary scaling {scaling_type!r}; Pagehold runs default and llama3")
        theta = float(metadata.number(key("rope.freq_base"), 10000.0))
        if _NAMES[Part.EMBEDDING] not in self._tensors:
            raise ModelError(f"{self._path} has no tensor {_NAMES[Part.EMBEDDING]}")
        spec = DecoderSpec(
            architecture=architecture,
            layers=metadata.count(key("block_count")),
            hidden_size=hidden_size,
            heads=heads,
            kv_heads=metadata.count(key("attention.head_count_kv"), heads),
            head_dim=head_dim,
            intermediate_size=metadata.count(key("feed_forward_length")),
            vocab_size=int(self._tensors[_NAMES[Part.EMBEDDING]].shape[1]),
            max_position_embeddings=metadata.count(key("context_length")),
            rms_norm_eps=_shortest(metadata.number(key("attention.layer_norm_rms_epsilon"))),
            rope_theta=_shortest(theta),
            rope_scaling=self._rope_scaling(theta, head_dim),
            qkv_bias=_NAMES[Part.QUERY_BIAS].format(0) in self._tensors,
            qk_norm=_NAMES[Part.QUERY_NORM].format(0) in self._tensors,
            tied_embeddings=_NAMES[Part.HEAD] not in self._tensors,
            sliding_window=int(metadata.number(key("attention.sliding_window"), 0)),
        )
        check_spec(spec)
        return spec

    def _rope_scaling(self, theta: float, head_dim: int) -> Llama3RopeScaling | None:
        """The llama3 rule behind the frequency divisors that a GGUF stores instead of it.

        The file keeps the divisors alone. Every published model of that rule has low and high
        frequency factors 1 and 4 and was trained on 8192 positions, and its largest divisor is
        the factor; the divisors that follow are compared with the file's.
        """
        if _ROPE_FACTORS not in self._tensors:
            return None
        divisors = self._decode(_ROPE_FACTORS).reshape(-1)
        if divisors.shape != (head_dim // 2,):
            raise ModelError(f"{self._path}: {_ROPE_FACTORS} has {divisors.size} divisors, want {head_dim // 2}")
        if np.all(divisors == 1):
            return None
        scaling = Llama3RopeScaling(float(divisors.max()), 1.0, 4.0, 8192)
        plain, scaled = (_frequencies(theta, head_dim, rule) for rule in (None, scaling))
        if not np.allclose(plain / scaled, divisors, rtol=1e-4):
            raise ModelError("unsupported rotary scaling: the file's divisors are not those of the llama3 rule")
        return scaling


def _frequencies(theta: float, head_dim: int, scaling: Llama3RopeScaling | None) -> npt.NDArray[np.float32]:
    spec = DecoderSpec("llama", 1, head_dim, 1, 1, head_dim, 1, 1, 1, 1.0, theta, scaling)
    return spec.inverse_frequencies()


def _shortest(value: float) -> float:
    """The shortest decimal with the same float32: 1e-05, which the file holds as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _halves(rows: int, heads: int) -> npt.NDArray[np.intp]:
    """Brings the rows of each head from (0, d/2, 1, d/2 + 1, …) back to (0, 1, …, d - 1)."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _blocks(data: npt.NDArray[np.uint8], kind: gguf.GGMLQuantizationType) -> Blocks:
    """data: [rows, bytes], as the file has it: in each block the scale, with Q4_1 the least value, then the codes."""
    size = _BLOCK_BYTES[kind]
    blocks = data.reshape(len(data), -1, size)

    def half(first: int) -> Float16:
        return np.ascontiguousarray(blocks[..., first : first + 2]).view(np.float16)[..., 0]

    scales = half(0)
    if kind is gguf.GGMLQuantizationType.Q8_0:
        return Blocks(scales, None, np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(len(data), -1))
    least = half(2) if kind is gguf.GGMLQuantizationType.Q4_1 else scales * np.float16(-8)
    packed = blocks[..., size - BLOCK // 2 :]
    codes = np.concatenate((packed & 15, packed >> 4), axis=-1)  # the first 16 inputs in the low halves
    return Blocks(scales, least, codes.reshape(len(data), -1))
