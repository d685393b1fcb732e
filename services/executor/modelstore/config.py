"""config.json to a decoder description, refusing what the kernels do not compute."""

from __future__ import annotations

from typing import Any

from services.executor.modelstore.errors import ModelError
from services.executor.modelstore.spec import DecoderSpec, Llama3RopeScaling

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
MAX_HEAD_DIM = 256


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """The description behind a transformers config, in the old or the new spelling of rotary parameters.

    Raises ModelError naming what is unsupported or missing.
    """
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ModelError(f"unsupported architecture {architecture!r}; Pagehold runs {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(config)
    hidden_size, heads, layers = (
        _size(config, key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    head_dim = config.get("head_dim") or (128 if architecture == "qwen3" else hidden_size // heads)
    theta, scaling = _rotary(config)
    spec = DecoderSpec(
        architecture=architecture,
        layers=layers,
        hidden_size=hidden_size,
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads,
        head_dim=head_dim,
        intermediate_size=_size(config, "intermediate_size"),
        vocab_size=_size(config, "vocab_size"),
        max_position_embeddings=_size(config, "max_position_embeddings"),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        sliding_window=_sliding_window(config, architecture, layers),
    )
    check_spec(spec)
    return spec


def check_spec(spec: DecoderSpec) -> None:
    """Raises ModelError for shapes that no decoder can have, or that the kernels do not compute."""
    if spec.heads % spec.kv_heads:
        raise ModelError(f"{spec.heads} attention heads cannot share {spec.kv_heads} K/V heads")
    if not 0 < spec.head_dim <= MAX_HEAD_DIM or spec.head_dim % 2:
        raise ModelError(f"unsupported head size {spec.head_dim}; it must be even and at most {MAX_HEAD_DIM}")


def _size(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelError(f"config.json: {key} is {value!r}, want a positive number")
    return value


def _refuse_unsupported(config: dict[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"unsupported activation {config['hidden_act']!r}; Pagehold runs silu")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ModelError(f"unsupported: {key} (only Qwen2's biases on query, key and value are)")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise ModelError(f"unsupported: weights quantized by {method!r}; use the unquantized model or a .gguf file")


def _rotary(config: dict[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError("unsupported: rotary embedding over a part of the head")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ModelError(f"unsupported rotary scaling {kind!r}; Pagehold runs default and llama3")
    try:
        return theta, Llama3RopeScaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"config.json: llama3 rotary scaling lacks a number for {error}") from error


def _sliding_window(config: dict[str, Any], architecture: str, layers: int) -> int:
    """Tokens a query sees; 0: all. Qwen's are on only by a switch, and only from some layer on."""
    if architecture == "llama":
        return 0
    if architecture == "mistral":
        return config.get("sliding_window", 4096) or 0
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    if not window:
        return 0
    kinds = config.get("layer_types")
    if kinds is None:
        full = min(int(config.get("max_window_layers", 28)), layers)
        kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if len(set(kinds)) > 1:
        raise ModelError("unsupported: layers with different attention windows")
    return int(window) if kinds[0] == "sliding_attention" else 0
