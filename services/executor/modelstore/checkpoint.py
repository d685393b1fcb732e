"""A model as its files hold it, before packing: what every source format must give.

A checkpoint is read once, by the conversion; nothing of it is needed when a packed model is opened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kernels.cpu.blocks import Blocks
from services.executor.modelstore.spec import DecoderSpec

BF16 = npt.NDArray[ml_dtypes.bfloat16]


class Part(StrEnum):
    """The weights of a decoder, unfused. Matrices are [rows out, columns in]."""

    EMBEDDING = "embedding"
    HEAD = "output head"
    FINAL_NORM = "final norm"
    ATTENTION_NORM = "attention norm"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    QUERY_BIAS = "query bias"
    KEY_BIAS = "key bias"
    VALUE_BIAS = "value bias"
    QUERY_NORM = "query norm"
    KEY_NORM = "key norm"
    ATTENTION_OUTPUT = "attention output"
    MLP_NORM = "mlp norm"
    GATE = "gate"
    UP = "up"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class TokenizerAssets:
    """What turns text into tokens and back, and tells where an answer ends."""

    tokenizer_json: bytes
    chat_template: str  # jinja; empty: the model has none
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    add_bos_token: bool
    special_tokens: dict[str, str]  # by the name that chat templates use: bos_token, eos_token, …


class Checkpoint(ABC):
    """A decoder's description, tokenizer and weights."""

    spec: DecoderSpec
    tokens: TokenizerAssets

    @abstractmethod
    def read(self, part: Part, layer: int | None = None) -> BF16:
        """One tensor, rounded once to bfloat16, in the layout of the Hugging Face implementation.

        Raises ModelError when the file has no such tensor or cannot decode it.
        """

    def blocks(self, part: Part, layer: int | None = None) -> Blocks | None:
        """The matrix in the file's own blocks of 4 or 8 bits, whose values are those of `read`; None: it has none."""
        return None


def round_to_bfloat16(values: npt.NDArray[np.generic]) -> BF16:
    """Nearest, ties to even. Float16 is widened first, which is exact, so nothing is rounded twice."""
    if values.dtype == ml_dtypes.bfloat16:
        return values
    return values.astype(np.float32, copy=False).astype(ml_dtypes.bfloat16)


END_NAMES = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


def end_token_ids(declared: list[int], special_ids: dict[str, int]) -> tuple[int, ...]:
    """Every id that ends an answer: the declared ones in their order, then well-known special tokens."""
    known = [special_ids[name] for name in END_NAMES if name in special_ids]
    return tuple(dict.fromkeys([*declared, *known]))
