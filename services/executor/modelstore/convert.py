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

from kernels.cpu.blocks import Blocks, joined, pack_blocks, pack_gate_up_blocks, round_to_int4, round_to_int8
from kernels.cpu.integer_blocks import pack_gate_up_integer_blocks, pack_integer_blocks
from kernels.cpu.integers import pack_gate_up_integers, pack_integers, round_to_integers
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
    Encoding,
    Tensor,
    TensorKind,
    Weights,
)
from services.executor.modelstore.rotation import RotatedCheckpoint

Progress = Callable[[int, int], None]  # tensors written, tensors in all


@dataclass(frozen=True, slots=True)
class _Item:
    """A tensor to write: its bytes and the logical shape behind them."""

    name: str
    kind: TensorKind
    shape: tuple[int, ...]
    data: npt.NDArray[np.generic]
    encoding: Encoding = Encoding.BFLOAT16


def convert(checkpoint: Checkpoint, name: str, source: str, folder: Path, progress: Progress, weights: Weights) -> None:
    """Writes the packed model into `folder`, which exists and is empty. `model.json` is written last.

    Raises ModelError for a tensor that is missing or of another shape than the description says.
    """
    if weights is Weights.INT8:
        checkpoint = RotatedCheckpoint(checkpoint)
    spec, tokens = checkpoint.spec, checkpoint.tokens
    total = 3 + spec.layers * (6 + spec.qkv_bias + 2 * spec.qk_norm) - spec.tied_embeddings
    digest = hashlib.sha256(f"pagehold model {FORMAT_VERSION}\n".encode())
    tensors: dict[str, Tensor] = {}
    with open(folder / WEIGHTS_FILE, "xb") as file:
        for item in _items(checkpoint, weights):
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


def _items(checkpoint: Checkpoint, weights: Weights) -> Iterator[_Item]:
    spec, matrices = checkpoint.spec, _Matrices(checkpoint, weights)
    hidden, head_dim, middle = spec.hidden_size, spec.head_dim, spec.intermediate_size
    queries, keys = spec.heads * head_dim, spec.kv_heads * head_dim
    read = matrices.read

    if not spec.tied_embeddings:
        table = np.ascontiguousarray(read(Part.EMBEDDING, None, spec.vocab_size, hidden))
        yield _Item("embedding", TensorKind.BFLOAT16, table.shape, table.view(np.uint16))
    head = Part.EMBEDDING if spec.tied_embeddings else Part.HEAD
    yield matrices.packed("output_head", None, [(head, spec.vocab_size)], hidden)
    yield _float32("final_norm", read(Part.FINAL_NORM, None, hidden))
    for i in range(spec.layers):
        prefix = f"layers.{i}."
        yield _float32(prefix + "attention_norm", read(Part.ATTENTION_NORM, i, hidden))
        rows = [(Part.QUERY, queries), (Part.KEY, keys), (Part.VALUE, keys)]
        yield matrices.packed(prefix + "qkv", i, rows, hidden)
        if spec.qkv_bias:
            biases = [(Part.QUERY_BIAS, queries), (Part.KEY_BIAS, keys), (Part.VALUE_BIAS, keys)]
            yield _float32(prefix + "qkv_bias", np.concatenate([read(part, i, size) for part, size in biases]))
        if spec.qk_norm:
            yield _float32(prefix + "q_norm", read(Part.QUERY_NORM, i, head_dim))
            yield _float32(prefix + "k_norm", read(Part.KEY_NORM, i, head_dim))
        yield matrices.packed(prefix + "attention_output", i, [(Part.ATTENTION_OUTPUT, hidden)], queries)
        yield _float32(prefix + "mlp_norm", read(Part.MLP_NORM, i, hidden))
        yield matrices.gate_up(prefix + "gate_up", i, middle, hidden)
        yield matrices.packed(prefix + "down", i, [(Part.DOWN, hidden)], middle)


class _Matrices:
    """Matrices of a checkpoint, each in the encoding that was asked for."""

    def __init__(self, checkpoint: Checkpoint, weights: Weights) -> None:
        self._checkpoint = checkpoint
        self._weights = weights

    def read(self, part: Part, layer: int | None, *shape: int) -> BF16:
        values = self._checkpoint.read(part, layer)
        if values.shape != shape:
            place = f"{part} of layer {layer}" if layer is not None else str(part)
            raise ModelError(f"the model's {place} has the shape {values.shape}, its description says {shape}")
        return values

    def packed(self, name: str, layer: int | None, rows: list[tuple[Part, int]], columns: int) -> _Item:
        """The parts below one another. rows: each with its number of rows."""
        shape = (sum(count for _, count in rows), columns)
        whole = joined([self._blocks(part, layer, count, columns) for part, count in rows])
        if whole is not None:
            pack = pack_integer_blocks if self._weights is Weights.INT4_INTEGERS else pack_blocks
            return _Item(name, TensorKind.PACKED, shape, pack(whole), self._encoding(whole))
        values = np.concatenate([self.read(part, layer, count, columns) for part, count in rows])
        if self._weights is Weights.INT8:
            return _Item(name, TensorKind.PACKED, shape, pack_integers(round_to_integers(values)), Encoding.INTEGERS)
        return _Item(name, TensorKind.PACKED, shape, pack_linear(np.ascontiguousarray(values)))

    def gate_up(self, name: str, layer: int, middle: int, hidden: int) -> _Item:
        gate, up = (self._blocks(part, layer, middle, hidden) for part in (Part.GATE, Part.UP))
        if gate is not None and up is not None and self._encoding(gate) is self._encoding(up):
            pack = pack_gate_up_integer_blocks if self._weights is Weights.INT4_INTEGERS else pack_gate_up_blocks
            return _Item(name, TensorKind.GATE_UP, (2 * middle, hidden), pack(gate, up), self._encoding(gate))
        shape = (2 * middle, hidden)
        values = (self.read(part, layer, middle, hidden) for part in (Part.GATE, Part.UP))
        if self._weights is Weights.INT8:
            packed = pack_gate_up_integers(*map(round_to_integers, values))
            return _Item(name, TensorKind.GATE_UP, shape, packed, Encoding.INTEGERS)
        return _Item(name, TensorKind.GATE_UP, shape, pack_gate_up(*values))

    def _blocks(self, part: Part, layer: int | None, rows: int, columns: int) -> Blocks | None:
        if self._weights in (Weights.BFLOAT16, Weights.INT8):
            return None
        found = self._checkpoint.blocks(part, layer)
        four_bits = self._weights is not Weights.FILE and layer is not None
        if found is not None and found.shape == (rows, columns) and not (four_bits and found.least is None):
            return found
        if self._weights is Weights.FILE:
            return None
        values = self.read(part, layer, rows, columns)
        return round_to_int4(values) if four_bits else round_to_int8(values)

    def _encoding(self, blocks: Blocks) -> Encoding:
        if self._weights is Weights.INT4_INTEGERS:
            return Encoding.INTEGER_BLOCKS8 if blocks.least is None else Encoding.INTEGER_BLOCKS4
        return Encoding.INT8 if blocks.least is None else Encoding.INT4


def _float32(name: str, values: BF16) -> _Item:
    """Vectors stay float32 in the file, with the values that bfloat16 left them."""
    assert values.dtype == ml_dtypes.bfloat16
    return _Item(name, TensorKind.FLOAT32, values.shape, values.astype(np.float32))


def _write(file: BinaryIO, item: _Item) -> Tensor:
    file.write(bytes(-file.tell() % ALIGNMENT))
    offset = file.tell()
    file.write(item.data.data.cast("B"))
    return Tensor(offset, item.data.nbytes, item.shape, item.kind, item.encoding)


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    """To the disk: a folder that is renamed into place after a power cut must not hold zeros."""
    file.flush()
    os.fsync(file.fileno())
