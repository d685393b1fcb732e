"""The default model's GGUF equals what transformers makes of the same file: tokens and weights."""

from __future__ import annotations

import pytest
import transformers
from tokenizers import Tokenizer

from services.executor.modelstore.packed import PackedModel
from services.executor.modelstore.source import find_source
from tests.models.unpacking import assert_same_weights

TEXTS = [
    "What is the capital of France?",
    "",
    " ",
    "\n\n\n",
    "  leading and trailing  ",
    "tabs\tand\r\nline ends\n\n  indented\n\tmore",
    "def f(x: int) -> list[int]:\n    return [x**2 for _ in range(10)]  # 0x1F\n",
    "1234567890 3.14159 1,000,000 2024-11-23 v1.2.3 x12y34",
    "a   12  34     56\n    7",
    "don't I'll we've THEY'RE it's O'Neil's 'quoted' \"double\"",
    "naïve café Ångström ß ﬁ Ⅷ ½ e\u0301 \u00a0 non-breaking \u200b zero-width",
    "漢字とカタカナ 한국어 العربية עברית हिन्दी ไทย",
    "🙂👩‍👩‍👧‍👦🇫🇷 👍🏽 emoji",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>text<|endoftext|><repo_name>x<file_sep>",
    "<|im_start|", "<| im_end |>",
    "\x00\x01\x7f control bytes \ufffd \U0010ffff",
    "{\"json\": [1, 2.5e-3, null], \"nested\": {\"a\": \"b\\n\"}}",
    "https://example.org/path?query=1&b=%20#fragment someone@example.org",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ALLCAPS MixedCase snake_case kebab-case CamelCaseWord",
    "$E = mc^2$ \\frac{a}{b} ∑∞ ≤ ≠ → ∂",
]  # fmt: skip


def test_the_tokenizer_equals_transformers(smollm2: PackedModel) -> None:
    path = find_source(None).path
    assert path is not None
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = Tokenizer.from_buffer(smollm2.tokenizer_json)
    for text in [*TEXTS, "".join(TEXTS)]:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert ours.get_vocab() == theirs.get_vocab()
    assert smollm2.chat_template == theirs.chat_template
    assert smollm2.special_tokens["bos_token"] == theirs.bos_token
    assert (smollm2.bos_token_id, smollm2.eos_token_ids[0]) == (theirs.bos_token_id, theirs.eos_token_id)
    assert smollm2.eos_token_ids == (2, 0)
    assert not smollm2.add_bos_token


def test_the_weights_equal_transformers_rounded_once(
    smollm2: PackedModel, transformers_smollm2: transformers.PreTrainedModel
) -> None:
    theirs, spec = transformers_smollm2, smollm2.spec
    assert_same_weights(smollm2, theirs.state_dict())
    assert smollm2.name == "SmolLM2-135M-Instruct"
    assert spec.inverse_frequencies() == pytest.approx(theirs.model.rotary_emb.inv_freq.numpy(), rel=1e-6)
    assert spec.rms_norm_eps == pytest.approx(theirs.config.rms_norm_eps)
    assert spec.max_position_embeddings == theirs.config.max_position_embeddings
