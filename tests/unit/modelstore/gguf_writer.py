"""Writes a tiny Hugging Face model as a GGUF file, the way llama.cpp's converter lays it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from services.executor.modelstore.spec import DecoderSpec, Llama3RopeScaling
from tests.models.tiny import MERGES, SPECIAL, TEMPLATE, tiny_tokenizer

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(
    model: transformers.PreTrainedModel,
    path: Path,
    *,
    scaling: Llama3RopeScaling | None = None,
    overrides: dict[str, Any] | None = None,
    drop: str = "",
    quantized: gguf.GGMLQuantizationType | None = None,
) -> None:
    """overrides: metadata keys to set last; a value of None leaves the key out. drop: a tensor to leave out.
    quantized: the type of all matrices.
    """
    config = model.config
    arch = "llama" if config.model_type == "mistral" else config.model_type
    names = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    values: dict[str, Any] = {
        "general.name": "Tiny",
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": getattr(config, "head_dim", None),
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [name for name, _ in names],
        "tokenizer.ggml.token_type": [3 if name in SPECIAL else 1 for name, _ in names],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
        **(overrides or {}),
    }
    writer = gguf.GGUFWriter(path, (overrides or {}).get("general.architecture", arch))
    values.pop("general.architecture", None)
    for key, value in values.items():
        _add(writer, key, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = _gguf_name(name)
        if stored == drop:
            continue
        array = tensor.float().numpy()
        if arch == "llama" and (".attn_q." in stored or ".attn_k." in stored):
            heads = config.num_attention_heads if ".attn_q." in stored else config.num_key_value_heads
            array = _interleave(array, heads)
        array = np.ascontiguousarray(array)
        if quantized is not None and array.ndim == 2:
            writer.add_tensor(stored, gguf.quants.quantize(array, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(stored, array)
    if scaling is not None:
        writer.add_tensor(
            "rope_freqs.weight", _divisors(scaling, config.head_dim, config.rope_parameters["rope_theta"])
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        raise TypeError(key)


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER[rest]}.{kind}"


def _interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of a head: (0, d/2, 1, d/2 + 1, …)."""
    rows = array.shape[0] // heads
    order = np.arange(rows).reshape(2, rows // 2).T.ravel()
    return array.reshape(heads, rows, -1)[:, order].reshape(array.shape)


def _divisors(scaling: Llama3RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    """The numbers that llama.cpp divides each frequency by, from transformers' own scaled frequencies."""
    config = transformers.LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
    )
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    return (plain / scaled.numpy()).astype(np.float32)


def plain_spec(head_dim: int, theta: float, scaling: Llama3RopeScaling | None) -> DecoderSpec:
    return DecoderSpec("llama", 1, head_dim, 1, 1, head_dim, 1, 1, 1, 1e-5, theta, scaling)
