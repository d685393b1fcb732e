"""Models with random weights, of the shapes of Llama 3, or a tiny one for the stand-in. Nothing is downloaded.

Weights are normal with Llama's initial deviation, norms are ones. Random numbers are random in any order, so panels
are filled as they lie in the file, and a converted model is written without a conversion.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from kernels.cpu.packing import PANEL
from services.executor.modelstore.packed import (
    ALIGNMENT,
    MODEL_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    Description,
    PackedModel,
    Tensor,
    TensorKind,
)
from services.executor.modelstore.source import find_source
from services.executor.modelstore.spec import DecoderSpec

LLAMA_3_8B: Final = DecoderSpec(
    architecture="llama",
    layers=32,
    hidden_size=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
)
LLAMA_3_1B: Final = DecoderSpec("llama", 16, 2048, 32, 8, 64, 8192, 128256, 8192, 1e-5, 500000.0)
TINY: Final = DecoderSpec("llama", 2, 256, 4, 2, 64, 128, 320, 512, 1e-5, 10000.0)

_DEVIATION: Final = 0.02
_CHUNK: Final = 1 << 28  # elements drawn at once


def weight_bytes(spec: DecoderSpec) -> int:
    """What a decode step reads of the weights: all but the embedding, of which it takes single rows."""
    return sum(t.nbytes for name, t in tensors_of(spec).items() if name != "embedding")


def tensors_of(spec: DecoderSpec) -> dict[str, Tensor]:
    """Names, kinds and places as a conversion gives them."""
    hidden, middle, queries = spec.hidden_size, spec.intermediate_size, spec.heads * spec.head_dim
    keys = spec.kv_heads * spec.head_dim
    wanted: list[tuple[str, TensorKind, tuple[int, ...]]] = [
        ("embedding", TensorKind.BFLOAT16, (spec.vocab_size, hidden)),
        ("output_head", TensorKind.PACKED, (spec.vocab_size, hidden)),
        ("final_norm", TensorKind.FLOAT32, (hidden,)),
    ]
    for layer in (f"layers.{i}." for i in range(spec.layers)):
        wanted += [
            (layer + "attention_norm", TensorKind.FLOAT32, (hidden,)),
            (layer + "qkv", TensorKind.PACKED, (queries + 2 * keys, hidden)),
            (layer + "attention_output", TensorKind.PACKED, (hidden, queries)),
            (layer + "mlp_norm", TensorKind.FLOAT32, (hidden,)),
            (layer + "gate_up", TensorKind.GATE_UP, (2 * middle, hidden)),
            (layer + "down", TensorKind.PACKED, (hidden, middle)),
        ]
    found: dict[str, Tensor] = {}
    offset = 0
    for name, kind, shape in wanted:
        offset = -(-offset // ALIGNMENT) * ALIGNMENT
        found[name] = Tensor(offset, _nbytes(kind, shape), shape, kind)
        offset += found[name].nbytes
    return found


def _nbytes(kind: TensorKind, shape: tuple[int, ...]) -> int:
    if kind is TensorKind.FLOAT32:
        return 4 * int(np.prod(shape))
    rows, columns = shape
    if kind is TensorKind.BFLOAT16:
        return 2 * rows * columns
    halves = 2 if kind is TensorKind.GATE_UP else 1
    return 2 * halves * -(-rows // halves // PANEL) * PANEL * -(-columns // 2) * 2


def make_packed(spec: DecoderSpec, folder: Path, weights: np.ndarray, device: torch.device) -> PackedModel:
    """Fills `weights`, uint8 of the whole size, and describes them. Nothing is written to the folder."""
    tensors = tensors_of(spec)
    generator = torch.Generator(device).manual_seed(0)
    for tensor in tensors.values():
        place = weights[tensor.offset : tensor.offset + tensor.nbytes]
        if tensor.kind is TensorKind.FLOAT32:
            place.view(np.float32)[:] = 1.0
            continue
        bits = place.view(np.int16)
        for start in range(0, len(bits), _CHUNK):
            part = bits[start : start + _CHUNK]
            drawn = torch.randn(len(part), generator=generator, device=device).mul_(_DEVIATION).bfloat16()
            torch.from_numpy(part).copy_(drawn.view(torch.int16))
    return PackedModel(
        folder=folder,
        name="random",
        spec=spec,
        weights=weights,  # type: ignore[arg-type]  # memory as good as a mapped file
        tensors=tensors,
        fingerprint="0" * 64,
        eos_token_ids=(0,),
        bos_token_id=None,
        add_bos_token=False,
        special_tokens={},
        chat_template="",
    )


def total_bytes(spec: DecoderSpec) -> int:
    last = list(tensors_of(spec).values())[-1]
    return last.offset + last.nbytes


def install(spec: DecoderSpec, work: Path, device: torch.device) -> tuple[Path, Path]:
    """A model folder for `--model`, and the XDG cache in which its conversion already lies."""
    source = work / f"random-{spec.layers}x{spec.hidden_size}"
    source.mkdir(parents=True, exist_ok=True)
    _write_once(source / "config.json", json.dumps(configuration(spec)))
    _write_once(source / "model.safetensors", "")  # its presence only: the conversion is there already
    _write_once(source / "tokenizer.json", _tokenizer(spec))
    found = find_source(str(source))
    name = f"{re.sub(r'[^A-Za-z0-9._-]+', '--', found.name)}-{found.key()}"
    folder = work / "cache" / "pagehold" / "models" / name
    if not (folder / MODEL_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        weights = np.memmap(folder / WEIGHTS_FILE, np.uint8, "w+", shape=(total_bytes(spec),))
        packed = make_packed(spec, folder, weights, device)
        weights.flush()
        tokenizer = (source / "tokenizer.json").read_bytes()
        (folder / TOKENIZER_FILE).write_bytes(tokenizer)
        description = Description(
            name="random",
            source=str(source),
            fingerprint=packed.fingerprint,
            spec=spec,
            tensors=packed.tensors,
            eos_token_ids=packed.eos_token_ids,
            bos_token_id=None,
            add_bos_token=False,
            special_tokens={},
            weights_bytes=total_bytes(spec),
            tokenizer_bytes=len(tokenizer),
        )
        (folder / MODEL_FILE).write_text(description.to_json())
    return source, work / "cache"


def configuration(spec: DecoderSpec) -> dict[str, Any]:
    """As of transformers."""
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
    }


def _tokenizer(spec: DecoderSpec) -> str:
    """A word for each id, so that every token has a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(spec.vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return str(tokenizer.to_str())


def _write_once(path: Path, text: str) -> None:
    """Its time of change is part of the conversion's name."""
    if not path.exists():
        path.write_text(text)
