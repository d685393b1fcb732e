"""From a checkpoint to a packed model's files. Reads one layer at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kernels.cpu.packing import pack_gate_up, pack_linear
from services.executor.modelstore.checkpoint import BF16, Checkpoint, Part
from services.executor.modelstore.errors import ModelError
from services.executor.modelstore.packed import (
    ALIGNMENT,
    FORMAT_VERSION,
    MODEL_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    Description,
    Tensor,
    TensorKind,
)

Progress = Callable[[int, int], None]  # tensors written, tensors in all


@dataclass(frozen=True, slots=True)
class _Item:
    """A tensor to write: its bytes and the logical shape behind them."""

    name: str
    kind: TensorKind
    shape: tuple[int, ...]
    data: npt.NDArray[np.generic]


def convert(checkpoint: Checkpoint, name: str, source: str, folder: Path, progress: Progress) -> None:
    """Writes the packed model into `folder`, which exists and is empty. `model.json` is written last.

    Raises ModelError for a tensor that is missing or of another shape than the description says.
    """
    spec, tokens = checkpoint.spec, checkpoint.tokens
    total = 3 + spec.layers * (6 + spec.qkv_bias + 2 * spec.qk_norm) - spec.tied_embeddings
    digest = hashlib.sha256(f"pagehold model {FORMAT_VERSION}\n".encode())
    tensors: dict[str, Tensor] = {}
    with open(folder / WEIGHTS_FILE, "xb") as file:
        for item in _items(checkpoint):
            tensors[item.name] = _write(file, item)
            digest.update(item.name.encode() + b"\0")
            digest.update(item.data.data.cast("B"))
            progress(len(tensors), total)
        _sync(file)
        weights_bytes = file.tell()
    identity = (asdict(spec), tokens.eos_token_ids, tokens.bos_token_id, tokens.add_bos_token)
    digest.update(json.dumps(identity, sort_keys=True).encode() + b"\0" + tokens.tokenizer_json)
    _write_file(folder / TOKENIZER_FILE, tokens.tokenizer_json)
    if tokens.chat_template:
        _write_file(folder / TEMPLATE_FILE, tokens.chat_template.encode())
    description = Description(
        name=name,
        source=source,
        fingerprint=digest.hexdigest(),
        spec=spec,
        tensors=tensors,
        eos_token_ids=tokens.eos_token_ids,
        bos_token_id=tokens.bos_token_id,
        add_bos_token=tokens.add_bos_token,
        special_tokens=tokens.special_tokens,
        weights_bytes=weights_bytes,
        tokenizer_bytes=len(tokens.tokenizer_json),
    )
    _write_file(folder / MODEL_FILE, description.to_json().encode())


def _items(checkpoint: Checkpoint) -> Iterator[_Item]:
    spec = checkpoint.spec
    hidden, head_dim, middle = spec.hidden_size, spec.head_dim, spec.intermediate_size
    queries, keys = spec.heads * head_dim, spec.kv_heads * head_dim

    def read(part: Part, layer: int | None, *shape: int) -> BF16:
        values = checkpoint.read(part, layer)
        if values.shape != shape:
            place = f"{part} of layer {layer}" if layer is not None else str(part)
            raise ModelError(f"the model's {place} has the shape {values.shape}, its description says {shape}")
        return values

    if spec.tied_embeddings:
        head = read(Part.EMBEDDING, None, spec.vocab_size, hidden)
    else:
        table = np.ascontiguousarray(read(Part.EMBEDDING, None, spec.vocab_size, hidden))
        yield _Item("embedding", TensorKind.BFLOAT16, table.shape, table.view(np.uint16))
        head = read(Part.HEAD, None, spec.vocab_size, hidden)
    yield _packed("output_head", head)
    yield _float32("final_norm", read(Part.FINAL_NORM, None, hidden))
    for i in range(spec.layers):
        prefix = f"layers.{i}."
        yield _float32(prefix + "attention_norm", read(Part.ATTENTION_NORM, i, hidden))
        rows = [(Part.QUERY, queries), (Part.KEY, keys), (Part.VALUE, keys)]
        yield _packed(prefix + "qkv", np.concatenate([read(part, i, size, hidden) for part, size in rows]))
        if spec.qkv_bias:
            biases = [(Part.QUERY_BIAS, queries), (Part.KEY_BIAS, keys), (Part.VALUE_BIAS, keys)]
            yield _float32(prefix + "qkv_bias", np.concatenate([read(part, i, size) for part, size in biases]))
        if spec.qk_norm:
            yield _float32(prefix + "q_norm", read(Part.QUERY_NORM, i, head_dim))
            yield _float32(prefix + "k_norm", read(Part.KEY_NORM, i, head_dim))
        yield _packed(prefix + "attention_output", read(Part.ATTENTION_OUTPUT, i, hidden, queries))
        yield _float32(prefix + "mlp_norm", read(Part.MLP_NORM, i, hidden))
        gate, up = read(Part.GATE, i, middle, hidden), read(Part.UP, i, middle, hidden)
        yield _Item(prefix + "gate_up", TensorKind.GATE_UP, (2 * middle, hidden), pack_gate_up(gate, up))
        yield _packed(prefix + "down", read(Part.DOWN, i, hidden, middle))


def _packed(name: str, weight: BF16) -> _Item:
    return _Item(name, TensorKind.PACKED, weight.shape, pack_linear(np.ascontiguousarray(weight)))


def _float32(name: str, values: BF16) -> _Item:
    """Vectors stay float32 in the file, with the values that bfloat16 left them."""
    assert values.dtype == ml_dtypes.bfloat16
    return _Item(name, TensorKind.FLOAT32, values.shape, values.astype(np.float32))


def _write(file: BinaryIO, item: _Item) -> Tensor:
    file.write(bytes(-file.tell() % ALIGNMENT))
    offset = file.tell()
    file.write(item.data.data.cast("B"))
    return Tensor(offset, item.data.nbytes, item.shape, item.kind)


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    """To the disk: a folder that is renamed into place after a power cut must not hold zeros."""
    file.flush()
    os.fsync(file.fileno())
