"""Small random models in the Hugging Face layout, one for each architecture and flag."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ a", "e r", "o n", "r e"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Tiny:
    """A named configuration."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def config(self) -> transformers.PreTrainedConfig:
        options = {
            "vocab_size": 320,
            "hidden_size": 72,  # neither it nor the MLP is a multiple of a panel
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.1,  # far from uniform logits
        }
        return transformers.AutoConfig.for_model(self.kind, **{**options, **self.options})


TINY = [
    Tiny("llama", "llama"),
    Tiny("llama-tied", "llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    Tiny("llama3-rope", "llama", {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1}),
    Tiny("mistral-window", "mistral", {"sliding_window": 24}),
    Tiny("mistral-full", "mistral", {"sliding_window": None, "head_dim": 64}),
    Tiny("qwen2", "qwen2", {"hidden_size": 128}),
    Tiny("qwen2-tied", "qwen2", {"hidden_size": 128, "tie_word_embeddings": True}),
    Tiny("qwen3", "qwen3"),
    Tiny("qwen3-tied", "qwen3", {"tie_word_embeddings": True, "head_dim": 64}),
]


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE of a few merges behind three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    tokenizer = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [tuple(merge.split(" ")) for merge in MERGES])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def save_tiny(tiny: Tiny, folder: Path, **save_options: Any) -> transformers.PreTrainedModel:
    """Writes the model; gives it back with its weights rounded to bfloat16, in float32."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(tiny.config(), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder, **save_options)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return round_parameters(model)


def round_parameters(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Parameters to bfloat16 values in float32. Buffers stay: rotary frequencies are never rounded."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
    return model.eval()
