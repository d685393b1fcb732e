"""A `tokenizers` tokenizer from a GGUF file's metadata: byte-level BPE.

Equal to what transformers builds from the same file, including where that departs from the
model's original tokenizer (digits of `smollm` are split by the merges alone).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from services.executor.modelstore.checkpoint import TokenizerAssets, end_token_ids
from services.executor.modelstore.errors import ModelError

_LLAMA3_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
_QWEN2_WORDS: Final = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
# How text is cut into words before merging; None: GPT-2's rule, which the library has built in.
_WORDS: Final[dict[str, str | None]] = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3_WORDS,
    "llama3": _LLAMA3_WORDS,
    "llama-v3": _LLAMA3_WORDS,
    "qwen2": _QWEN2_WORDS,
    "deepseek-r1-qwen": _QWEN2_WORDS,
}
_SPECIAL: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


class TokenType(IntEnum):
    CONTROL = 3
    USER_DEFINED = 4


def read_tokens(get: Callable[[str], Any]) -> TokenizerAssets:
    """Everything about tokens that the metadata holds. `get(key)` gives a value or None.

    Raises ModelError for tokenizers other than byte-level BPE and for unknown word rules.
    """
    model, rule = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre") or "default"
    if model != "gpt2":
        raise ModelError(f"unsupported GGUF tokenizer {model!r}; Pagehold reads gpt2 (byte-level BPE)")
    if rule not in _WORDS:
        raise ModelError(f"unsupported GGUF pre-tokenizer {rule!r}; Pagehold reads {', '.join(_WORDS)}")
    names, kinds, merges = (get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    if not names or merges is None:
        raise ModelError("the GGUF file has no vocabulary or no merges")
    kinds = kinds or [0] * len(names)
    if len(kinds) != len(names):
        raise ModelError("the GGUF file's token types do not match its vocabulary")

    tokenizer = _build(names, kinds, merges, _WORDS[rule])
    ids = {key: get(f"tokenizer.ggml.{name}") for key, name in _SPECIAL.items()}
    ids = {key: value for key, value in ids.items() if isinstance(value, int) and 0 <= value < len(names)}
    for value in ids.values():
        tokenizer.add_special_tokens([AddedToken(names[value], normalized=False, special=True)])
    controls = {
        name: token for token, (name, kind) in enumerate(zip(names, kinds, strict=True)) if kind == TokenType.CONTROL
    }
    declared = [get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    add_bos = get("tokenizer.ggml.add_bos_token")
    if add_bos is None:  # older files of this family leave it to the reader
        add_bos = _WORDS[rule] is _LLAMA3_WORDS
    return TokenizerAssets(
        tokenizer_json=tokenizer.to_str().encode(),
        chat_template=get("tokenizer.chat_template") or "",
        eos_token_ids=end_token_ids([token for token in declared if token is not None], controls),
        bos_token_id=ids.get("bos_token"),
        add_bos_token=bool(add_bos) and "bos_token" in ids,
        special_tokens={key: names[value] for key, value in ids.items()},
    )


def _build(names: list[str], kinds: list[int], merges: list[str], words: str | None) -> Tokenizer:
    spelling = _byte_spelling()
    alphabet = set(spelling)
    # Added tokens may be stored as plain text, which the byte-level decoder would not give back.
    vocabulary = {
        name if set(name) <= alphabet else "".join(spelling[byte] for byte in name.encode()): token
        for token, name in enumerate(names)
    }
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, fuse_unk=False))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"the GGUF file's merges do not fit its vocabulary: {error}") from error
    if words is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    for kind in TokenType:
        special = kind is TokenType.CONTROL
        added = [
            AddedToken(name, normalized=False, special=special)
            for name, token_kind in zip(names, kinds, strict=True)
            if token_kind == kind and name in vocabulary
        ]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)
    return tokenizer


def _byte_spelling() -> list[str]:
    """GPT-2's spelling of the 256 bytes: printable ones as themselves, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + hidden.index(byte)) for byte in range(256)]
