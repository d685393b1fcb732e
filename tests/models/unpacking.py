"""Weights of a packed model back in the names and shapes of the Hugging Face implementation."""

from __future__ import annotations

import numpy as np

from kernels.cpu.packing import unpack_gate_up, unpack_linear
from services.executor.modelstore.packed import PackedModel, TensorKind


def _matrix(model: PackedModel, name: str) -> np.ndarray:
    """float32 in the logical shape."""
    tensor = model.tensors[name]
    if tensor.kind is TensorKind.FLOAT32:
        return np.array(model.view(name))
    if tensor.kind is TensorKind.PACKED:
        bits = unpack_linear(model.view(name), *tensor.shape).view(np.uint16)
    else:
        assert tensor.kind is TensorKind.BFLOAT16
        bits = model.view(name)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def unpacked(model: PackedModel) -> dict[str, np.ndarray]:
    """float32 by the names of `state_dict`; the head of a tied model is left out."""
    spec = model.spec
    head = _matrix(model, "output_head")
    weights = {"model.norm.weight": _matrix(model, "final_norm")}
    if spec.tied_embeddings:
        weights["model.embed_tokens.weight"] = head
    else:
        weights["model.embed_tokens.weight"] = _matrix(model, "embedding")
        weights["lm_head.weight"] = head
    edges = np.cumsum([spec.heads, spec.kv_heads]) * spec.head_dim
    for i in range(spec.layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for name, part in zip("qkv", np.split(_matrix(model, ours + "qkv"), edges), strict=True):
            weights[f"{theirs}self_attn.{name}_proj.weight"] = part
        if spec.qkv_bias:
            for name, part in zip("qkv", np.split(_matrix(model, ours + "qkv_bias"), edges), strict=True):
                weights[f"{theirs}self_attn.{name}_proj.bias"] = part
        if spec.qk_norm:
            weights[f"{theirs}self_attn.q_norm.weight"] = _matrix(model, ours + "q_norm")
            weights[f"{theirs}self_attn.k_norm.weight"] = _matrix(model, ours + "k_norm")
        weights[f"{theirs}self_attn.o_proj.weight"] = _matrix(model, ours + "attention_output")
        weights[f"{theirs}input_layernorm.weight"] = _matrix(model, ours + "attention_norm")
        weights[f"{theirs}post_attention_layernorm.weight"] = _matrix(model, ours + "mlp_norm")
        weights[f"{theirs}mlp.down_proj.weight"] = _matrix(model, ours + "down")
        gate_up = unpack_gate_up(model.view(ours + "gate_up"), spec.intermediate_size, spec.hidden_size)
        for name, packed in zip(("gate", "up"), gate_up, strict=True):
            bits = packed.view(np.uint16).astype(np.uint32) << 16
            weights[f"{theirs}mlp.{name}_proj.weight"] = bits.view(np.float32)
    return weights


def assert_same_weights(model: PackedModel, state: dict) -> None:
    """Bit for bit: `state` is a transformers state_dict, already rounded to bfloat16 values."""
    ours = unpacked(model)
    wanted = {name: tensor.float().numpy() for name, tensor in state.items()}
    if model.spec.tied_embeddings:
        wanted.pop("lm_head.weight", None)
    assert ours.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(ours[name].view(np.uint32), values.view(np.uint32), err_msg=name)
