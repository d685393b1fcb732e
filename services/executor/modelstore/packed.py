"""A converted model in its folder: one file of aligned weights, and what describes it.

weights.bin           the tensors, each at a multiple of 4096 bytes, mapped read-only
model.json            format version, decoder description, tensor table, token ids, fingerprint
tokenizer.json        as the `tokenizers` library reads it
chat_template.jinja   absent when the model has none
"""

from __future__ import annotations

import json
import mmap
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from services.executor.modelstore.errors import ModelError
from services.executor.modelstore.spec import DecoderSpec, Llama3RopeScaling

FORMAT_VERSION: Final = 3
ALIGNMENT: Final = 4096
_MADV_POPULATE_READ: Final = 22
WEIGHTS_FILE: Final = "weights.bin"
MODEL_FILE: Final = "model.json"
TOKENIZER_FILE: Final = "tokenizer.json"
TEMPLATE_FILE: Final = "chat_template.jinja"


class TensorKind(StrEnum):
    PACKED = "packed"  # panels
    GATE_UP = "gate_up"  # panels of gate and up in turn
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"  # row-major


class Encoding(StrEnum):
    """Of the weights in panels."""

    BFLOAT16 = "bfloat16"  # `kernels.cpu.packing`
    INT8 = "int8"  # `kernels.cpu.blocks`
    INT4 = "int4"
    INTEGERS = "integers"  # `kernels.cpu.integers`
    INTEGER_BLOCKS8 = "integer_blocks8"  # `kernels.cpu.integer_blocks`
    INTEGER_BLOCKS4 = "integer_blocks4"


class Weights(StrEnum):
    """What a model's matrices are packed as."""

    BFLOAT16 = "bfloat16"
    FILE = "file"  # the file's own blocks of 4 or 8 bits, which mean the same values; else bfloat16
    INT8 = "int8"  # rotated and rounded to 8 bits, and multiplied as such
    INT4 = "int4"  # 4 bits: the file's own blocks, else rounded; 8 for the output head
    INT4_INTEGERS = "int4-integers"  # the same blocks, multiplied as integers


_ELEMENTS: Final = {
    Encoding.BFLOAT16: np.uint16,
    Encoding.INT8: np.int8,
    Encoding.INT4: np.uint8,
    Encoding.INTEGERS: np.uint32,
    Encoding.INTEGER_BLOCKS8: np.int32,
    Encoding.INTEGER_BLOCKS4: np.int64,
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies in `weights.bin`."""

    offset: int  # bytes
    nbytes: int
    shape: tuple[int, ...]  # logical: [rows, columns] without the padding of panels
    kind: TensorKind
    encoding: Encoding = Encoding.BFLOAT16


@dataclass(frozen=True, slots=True)
class PackedModel:
    """An opened model. The weights are mapped, not read."""

    folder: Path
    name: str
    spec: DecoderSpec
    weights: np.memmap[Any, np.dtype[np.uint8]]
    tensors: dict[str, Tensor]
    fingerprint: str  # hex SHA-256 of weights, tokenizer and description
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    add_bos_token: bool  # encode without special tokens, then put the bos token in front
    special_tokens: dict[str, str]
    chat_template: str  # empty: none
    compact: PackedModel | None = None  # the same values in fewer bytes, for steps of few tokens

    @property
    def tokenizer_json(self) -> bytes:
        return (self.folder / TOKENIZER_FILE).read_bytes()

    def populate(self) -> None:
        """Puts the weights into memory and into this process's page tables: a first step then faults nothing."""
        if self.compact is not None:
            self.compact.populate()
        mapped = self.weights.base
        assert isinstance(mapped, mmap.mmap)
        try:
            mapped.madvise(_MADV_POPULATE_READ)
        except OSError:
            mapped.madvise(mmap.MADV_WILLNEED)  # a kernel before 5.14

    def views(self) -> dict[str, npt.NDArray[np.generic]]:
        """All tensors by their names."""
        return {name: self.view(name) for name in self.tensors}

    def view(self, name: str) -> npt.NDArray[np.generic]:
        """One tensor in place: float32, or uint16 for bfloat16; flat when in panels, and then int8 or uint8 for
        blocks of 8 or 4 bits, uint32 for integers, int32 or int64 for blocks of integers of 8 or 4 bits.
        """
        tensor = self.tensors[name]
        raw = self.weights[tensor.offset : tensor.offset + tensor.nbytes]
        if tensor.kind is TensorKind.FLOAT32:
            return raw.view(np.float32).reshape(tensor.shape)
        if tensor.kind is TensorKind.BFLOAT16:
            return raw.view(np.uint16).reshape(tensor.shape)
        return raw.view(_ELEMENTS[tensor.encoding])


@dataclass(frozen=True, slots=True)
class Description:
    """The contents of `model.json`."""

    name: str
    source: str  # for people: where the model came from
    fingerprint: str
    spec: DecoderSpec
    tensors: dict[str, Tensor]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    add_bos_token: bool
    special_tokens: dict[str, str]
    weights_bytes: int
    tokenizer_bytes: int

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT_VERSION, **asdict(self)}, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Description:
        """Raises ValueError, KeyError or TypeError on anything but what `to_json` of this version wrote."""
        data = json.loads(text)
        if data.pop("format") != FORMAT_VERSION:
            raise ValueError("written by another version")
        if set(data) != {field.name for field in fields(cls)}:
            raise ValueError("fields are missing or unknown")
        spec = data["spec"]
        if spec["rope_scaling"] is not None:
            spec["rope_scaling"] = Llama3RopeScaling(**spec["rope_scaling"])
        data["spec"] = DecoderSpec(**spec)
        data["tensors"] = {
            name: Tensor(
                entry["offset"],
                entry["nbytes"],
                tuple(entry["shape"]),
                TensorKind(entry["kind"]),
                Encoding(entry["encoding"]),
            )
            for name, entry in data["tensors"].items()
        }
        data["eos_token_ids"] = tuple(data["eos_token_ids"])
        return cls(**data)


def open_packed(folder: Path) -> PackedModel:
    """Maps a converted model.

    Raises FileNotFoundError when there is none, ModelError when it is damaged or of another version.
    """
    data = (folder / MODEL_FILE).read_bytes()
    try:
        description = Description.from_json(data.decode("utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / MODEL_FILE} is damaged or of another version: {error}") from error
    for name, wanted in ((WEIGHTS_FILE, description.weights_bytes), (TOKENIZER_FILE, description.tokenizer_bytes)):
        size = (folder / name).stat().st_size
        if size != wanted:
            raise ModelError(f"{folder / name} is damaged: it has {size} bytes instead of {wanted}")
    end = max(tensor.offset + tensor.nbytes for tensor in description.tensors.values())
    if end > description.weights_bytes:
        raise ModelError(f"{folder / MODEL_FILE} is damaged: a tensor ends beyond {WEIGHTS_FILE}")
    template = folder / TEMPLATE_FILE
    return PackedModel(
        folder=folder,
        name=description.name,
        spec=description.spec,
        weights=np.memmap(folder / WEIGHTS_FILE, np.uint8, "r"),
        tensors=description.tensors,
        fingerprint=description.fingerprint,
        eos_token_ids=description.eos_token_ids,
        bos_token_id=description.bos_token_id,
        add_bos_token=description.add_bos_token,
        special_tokens=description.special_tokens,
        chat_template=template.read_text("utf-8") if template.exists() else "",
    )
