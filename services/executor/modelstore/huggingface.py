"""Models in the Hugging Face layout: config.json, *.safetensors (sharded or not), tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import safetensors
from tokenizers import Tokenizer

from services.executor.modelstore.checkpoint import (
    BF16,
    Checkpoint,
    Part,
    TokenizerAssets,
    end_token_ids,
    round_to_bfloat16,
)
from services.executor.modelstore.config import spec_from_config
from services.executor.modelstore.errors import ModelError

_NAMES: Final = {
    Part.EMBEDDING: "model.embed_tokens.weight",
    Part.HEAD: "lm_head.weight",
    Part.FINAL_NORM: "model.norm.weight",
    Part.ATTENTION_NORM: "model.layers.{}.input_layernorm.weight",
    Part.QUERY: "model.layers.{}.self_attn.q_proj.weight",
    Part.KEY: "model.layers.{}.self_attn.k_proj.weight",
    Part.VALUE: "model.layers.{}.self_attn.v_proj.weight",
    Part.QUERY_BIAS: "model.layers.{}.self_attn.q_proj.bias",
    Part.KEY_BIAS: "model.layers.{}.self_attn.k_proj.bias",
    Part.VALUE_BIAS: "model.layers.{}.self_attn.v_proj.bias",
    Part.QUERY_NORM: "model.layers.{}.self_attn.q_norm.weight",
    Part.KEY_NORM: "model.layers.{}.self_attn.k_norm.weight",
    Part.ATTENTION_OUTPUT: "model.layers.{}.self_attn.o_proj.weight",
    Part.MLP_NORM: "model.layers.{}.post_attention_layernorm.weight",
    Part.GATE: "model.layers.{}.mlp.gate_proj.weight",
    Part.UP: "model.layers.{}.mlp.up_proj.weight",
    Part.DOWN: "model.layers.{}.mlp.down_proj.weight",
}
_FLOATS: Final = ("BF16", "F16", "F32")


class HuggingFaceCheckpoint(Checkpoint):
    """A folder as `save_pretrained` writes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        config = read_json(folder / "config.json")
        self.spec = spec_from_config(config)
        self._files = _tensor_files(folder)
        self._handles: dict[Path, Any] = {}
        self.tokens = _read_tokens(folder, config)

    def read(self, part: Part, layer: int | None = None) -> BF16:
        name = _NAMES[part].format(layer)
        path = self._files.get(name)
        if path is None:
            raise ModelError(f"the model in {self._folder} has no tensor {name}")
        try:
            if path not in self._handles:
                self._handles[path] = safetensors.safe_open(path, framework="numpy")
            handle = self._handles[path]
            dtype = handle.get_slice(name).get_dtype()
            if dtype not in _FLOATS:
                raise ModelError(f"unsupported element type {dtype} of {name} in {path.name}; want one of {_FLOATS}")
            return round_to_bfloat16(handle.get_tensor(name))
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """An object, or ModelError."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} is not a model in the Hugging Face layout: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        mapping = read_json(index).get("weight_map")
        if not isinstance(mapping, dict):
            raise ModelError(f"{index} has no weight_map")
        files = {str(name): folder / Path(str(file)).name for name, file in mapping.items()}
        missing = sorted({path.name for path in files.values() if not path.exists()})
        if missing:
            raise ModelError(f"{folder} is incomplete: {', '.join(missing[:3])} named by {index.name} is missing")
        return files
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="numpy") as handle:
                files.update(dict.fromkeys(handle.keys(), path))
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
    if not files:
        raise ModelError(f"{folder} has no *.safetensors file; other weight formats are not read")
    return files


def _read_tokens(folder: Path, config: dict[str, Any]) -> TokenizerAssets:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ModelError(f"{folder} has no tokenizer.json; save the model with a fast tokenizer first")
    data = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path} cannot be read: {error}") from error
    options = _optional_json(folder / "tokenizer_config.json")
    generation = _optional_json(folder / "generation_config.json")

    special_tokens = _special_tokens(options)
    special_ids = {
        token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
    }
    declared = [*_ids(generation.get("eos_token_id")), *_ids(config.get("eos_token_id"))]
    eos_name = special_tokens.get("eos_token")
    if eos_name is not None and (eos_id := tokenizer.token_to_id(eos_name)) is not None:
        declared.append(eos_id)

    bos_name = special_tokens.get("bos_token")
    bos_id = tokenizer.token_to_id(bos_name) if bos_name is not None else None
    if bos_id is None:
        bos_id = next(iter(_ids(config.get("bos_token_id"))), None)
    add_bos = options.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = bos_id is not None and tokenizer.encode("a").ids[:1] == [bos_id]
    return TokenizerAssets(
        tokenizer_json=data,
        chat_template=_chat_template(folder, options),
        eos_token_ids=end_token_ids(declared, special_ids),
        bos_token_id=bos_id,
        add_bos_token=add_bos and bos_id is not None,
        special_tokens=special_tokens,
    )


def _ids(value: object) -> list[int]:
    """Token ids that a configuration gives as one number, as a list, or not at all."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def _special_tokens(options: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = options.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _chat_template(folder: Path, options: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text("utf-8")
    template = options.get("chat_template") or _optional_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several by name: the one called default is meant for chat
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else ""
