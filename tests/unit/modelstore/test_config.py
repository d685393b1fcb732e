"""config.json to a description: both spellings of rotary parameters, and what is refused."""

from __future__ import annotations

import pytest

from services.executor.modelstore.config import spec_from_config
from services.executor.modelstore.errors import ModelError
from services.executor.modelstore.spec import Llama3RopeScaling

BASE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_defaults() -> None:
    spec = spec_from_config(BASE)
    assert (spec.kv_heads, spec.head_dim, spec.rms_norm_eps, spec.rope_theta) == (4, 16, 1e-6, 10000.0)
    assert not (spec.tied_embeddings or spec.qkv_bias or spec.qk_norm or spec.sliding_window or spec.rope_scaling)


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    ],
)
def test_rotary_spellings(rotary: dict) -> None:
    spec = spec_from_config({**BASE, **rotary})
    assert spec.rope_theta == 5e5
    assert spec.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral"}, 4096),  # the class's default
        ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "mistral", "sliding_window": 7}, 7),
        ({"model_type": "llama", "sliding_window": 7}, 0),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": False}, 0),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}, 7),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2}, 0),
        ({"model_type": "qwen3", "sliding_window": 7, "use_sliding_window": True}, 0),
    ],
)
def test_sliding_windows(changes: dict, window: int) -> None:
    assert spec_from_config({**BASE, **changes}).sliding_window == window


def test_flags_of_the_qwens() -> None:
    qwen2, qwen3 = (spec_from_config({**BASE, "model_type": kind}) for kind in ("qwen2", "qwen3"))
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, 16)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "architecture 'mixtral'"),
        ({"model_type": None}, "architecture None"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized by 'awq'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "lacks a number for 'factor'"),
        ({"partial_rotary_factor": 0.5}, "part of the head"),
        (
            {"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
            "different attention windows",
        ),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"head_dim": 512}, "head size 512"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
    ],
)
def test_unsupported_models_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_from_config({**BASE, **changes})
