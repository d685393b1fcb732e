"""GGUF files equal the folder that they were made from, tensor by tensor; the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from services.executor.modelstore.checkpoint import Part
from services.executor.modelstore.gguf_file import GgufCheckpoint
from services.executor.modelstore.packed import Encoding, Weights
from services.executor.modelstore.spec import Llama3RopeScaling
from services.executor.modelstore.store import ModelError, open_model
from tests.models.tiny import TEMPLATE, TINY, Tiny, save_tiny, tiny_tokenizer
from tests.models.unpacking import assert_same_weights
from tests.unit.modelstore.gguf_writer import write_gguf

LLAMA = TINY[0]
PLAIN = [tiny for tiny in TINY if tiny.name not in ("llama3-rope", "mistral-window")]


@pytest.mark.parametrize("tiny", PLAIN, ids=lambda tiny: tiny.name)
def test_weights_and_description_equal_the_folders(tiny: Tiny, tmp_path: Path) -> None:
    rounded = save_tiny(tiny, tmp_path / "m")
    write_gguf(rounded, tmp_path / "tiny.Q8_0.gguf")
    folder = open_model(str(tmp_path / "m"), tmp_path / "cache", progress=False)
    file = open_model(str(tmp_path / "tiny.Q8_0.gguf"), tmp_path / "cache", progress=False)
    assert file.name == "tiny"
    assert_same_weights(file, rounded.state_dict())
    mistral = tiny.kind == "mistral"  # a GGUF does not tell it from llama
    assert file.spec == (_renamed(folder.spec) if mistral else folder.spec)
    assert file.eos_token_ids == folder.eos_token_ids
    assert (file.bos_token_id, file.add_bos_token) == (1, False)
    assert file.special_tokens == {key: folder.special_tokens[key] for key in ("bos_token", "eos_token", "unk_token")}
    assert file.chat_template == TEMPLATE
    text = "the then\t weather <|im_start|>in 2024\n\n  é 漢字 🙂"
    assert Tokenizer.from_buffer(file.tokenizer_json).encode(text).ids == tiny_tokenizer().encode(text).ids


BLOCKS = {name: gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0")}
WIDE = Tiny("wide", "llama", {"hidden_size": 96, "intermediate_size": 160, "num_key_value_heads": 1})


@pytest.fixture(params=BLOCKS)
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    rounded = save_tiny(WIDE, tmp_path / "m")
    write_gguf(rounded, tmp_path / f"tiny-{request.param}.gguf", quantized=BLOCKS[request.param])
    return tmp_path / f"tiny-{request.param}.gguf"


def test_blocks_of_the_file_mean_the_same_weights(quantized: Path) -> None:
    checkpoint = GgufCheckpoint(quantized)
    for part in (Part.EMBEDDING, Part.HEAD):
        same_values(checkpoint, part, None)
    for part in (Part.QUERY, Part.KEY, Part.VALUE, Part.ATTENTION_OUTPUT, Part.GATE, Part.UP, Part.DOWN):
        same_values(checkpoint, part, 1)
    assert checkpoint.blocks(Part.MLP_NORM, 0) is None


def same_values(checkpoint: GgufCheckpoint, part: Part, layer: int | None) -> None:
    blocks = checkpoint.blocks(part, layer)
    assert blocks is not None
    np.testing.assert_array_equal(
        blocks.values().astype(np.float32), checkpoint.read(part, layer).astype(np.float32), err_msg=part
    )


def in_integers(encoding: Encoding) -> Encoding:
    return Encoding.INTEGER_BLOCKS8 if encoding is Encoding.INT8 else Encoding.INTEGER_BLOCKS4


def test_the_models_matrices_are_in_the_encoding_that_was_asked_for(quantized: Path, tmp_path: Path) -> None:
    own = Encoding.INT8 if "Q8_0" in quantized.name else Encoding.INT4
    for weights, layers, head in (
        (Weights.BFLOAT16, Encoding.BFLOAT16, Encoding.BFLOAT16),
        (Weights.FILE, own, own),
        (Weights.INT8, Encoding.INTEGERS, Encoding.INTEGERS),
        (Weights.INT4, Encoding.INT4, own),
        (Weights.INT4_INTEGERS, Encoding.INTEGER_BLOCKS4, in_integers(own)),
    ):
        model = open_model(str(quantized), tmp_path / "cache", progress=False, weights=weights)
        assert model.tensors["output_head"].encoding is head
        for name in ("qkv", "attention_output", "gate_up", "down"):
            assert model.tensors[f"layers.0.{name}"].encoding is layers
        again = open_model(str(quantized), tmp_path / "cache", progress=False, weights=weights)
        assert again.tensors == model.tensors and again.fingerprint == model.fingerprint


def test_a_model_without_blocks_is_rounded_where_that_is_asked_for(tmp_path: Path) -> None:
    save_tiny(LLAMA, tmp_path / "m")
    for weights, layers in (
        (Weights.FILE, Encoding.BFLOAT16),
        (Weights.INT8, Encoding.INTEGERS),
        (Weights.INT4, Encoding.INT4),
        (Weights.INT4_INTEGERS, Encoding.INTEGER_BLOCKS4),
    ):
        model = open_model(str(tmp_path / "m"), tmp_path / "cache", progress=False, weights=weights)
        assert model.tensors["layers.0.down"].encoding is layers
    plain = open_model(str(tmp_path / "m"), tmp_path / "cache", progress=False)
    assert plain.folder == open_model(str(tmp_path / "m"), tmp_path / "cache", False, Weights.FILE).folder


def _renamed(spec: object) -> object:
    from dataclasses import replace

    return replace(spec, architecture="llama")  # type: ignore[type-var]


def test_llama3_scaling_is_recovered_from_the_divisors(tmp_path: Path) -> None:
    rounded = save_tiny(LLAMA, tmp_path / "m")
    scaling = Llama3RopeScaling(32.0, 1.0, 4.0, 8192)
    write_gguf(rounded, tmp_path / "tiny.gguf", scaling=scaling)
    assert open_model(str(tmp_path / "tiny.gguf"), tmp_path / "cache", progress=False).spec.rope_scaling == scaling

    write_gguf(rounded, tmp_path / "odd.gguf", scaling=Llama3RopeScaling(32.0, 1.0, 4.0, 512))
    with pytest.raises(ModelError, match="divisors are not those of the llama3 rule"):
        open_model(str(tmp_path / "odd.gguf"), tmp_path / "cache", progress=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"general.architecture": "gemma"}, "architecture 'gemma'"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.scaling.type": "yarn"}, "rotary scaling 'yarn'"),
        ({"llama.rope.dimension_count": 16}, "part of the head"),
        ({"llama.attention.value_length": 16}, "different sizes"),
        ({"llama.block_count": None}, "llama.block_count is NoneType|llama.block_count is missing"),
        ({"llama.attention.head_count_kv": [1, 2]}, "head_count_kv is list"),
        ({"llama.block_count": 3}, r"no tensor blk\.2\.attn_norm\.weight"),
        ({"llama.feed_forward_length": 100}, "gate of layer 0 has the shape"),
        ({"tokenizer.ggml.model": "llama"}, "GGUF tokenizer 'llama'"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"tokenizer.ggml.tokens": None}, "no vocabulary"),
        ({"tokenizer.ggml.merges": ["x y"]}, "merges do not fit"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token types do not match"),
    ],
)
def test_what_cannot_be_run_is_refused(overrides: dict, message: str, tmp_path: Path) -> None:
    write_gguf(save_tiny(LLAMA, tmp_path / "m"), tmp_path / "tiny.gguf", overrides=overrides)
    with pytest.raises(ModelError, match=message):
        open_model(str(tmp_path / "tiny.gguf"), tmp_path / "cache", progress=False)


def test_a_missing_tensor_and_a_cut_file_are_refused(tmp_path: Path) -> None:
    model = save_tiny(LLAMA, tmp_path / "m")
    write_gguf(model, tmp_path / "tiny.gguf", drop="token_embd.weight")
    with pytest.raises(ModelError, match=r"no tensor token_embd\.weight"):
        open_model(str(tmp_path / "tiny.gguf"), tmp_path / "cache", progress=False)
    write_gguf(model, tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    for length in (0, 3, 100, 5000, len(data) - 4096):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(ModelError, match="not a readable GGUF file"):
            open_model(str(tmp_path / "cut.gguf"), tmp_path / "cache", progress=False)


def test_plain_text_tokens_of_a_gguf_round_trip(tmp_path: Path) -> None:
    """Added tokens stored as text (with a space) are no byte-level spelling; user-defined ones stay whole."""
    names = sorted(tiny_tokenizer().get_vocab(), key=tiny_tokenizer().get_vocab().get)
    names += ["<think>", "a b"]
    kinds = [3] * 3 + [1] * (len(names) - 5) + [4, 4]
    overrides = {"tokenizer.ggml.tokens": names, "tokenizer.ggml.token_type": kinds}
    write_gguf(save_tiny(LLAMA, tmp_path / "m"), tmp_path / "tiny.gguf", overrides=overrides)
    model = open_model(str(tmp_path / "tiny.gguf"), tmp_path / "cache", progress=False)
    tokenizer = Tokenizer.from_buffer(model.tokenizer_json)
    assert len(names) - 2 in tokenizer.encode("x<think>y").ids
    assert tokenizer.decode([len(names) - 1]) == "a b"
    assert json.loads(model.tokenizer_json)["added_tokens"][-1]["special"] is False
    assert np.array_equal(tokenizer.encode("<|im_end|>").ids, [2])


@pytest.mark.parametrize(("pre", "added"), [("llama-bpe", True), ("qwen2", False), ("smollm", False)])
def test_add_bos_when_the_file_does_not_say(pre: str, added: bool, tmp_path: Path) -> None:
    overrides = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": None}
    write_gguf(save_tiny(LLAMA, tmp_path / "m"), tmp_path / "tiny.gguf", overrides=overrides)
    assert open_model(str(tmp_path / "tiny.gguf"), tmp_path / "cache", progress=False).add_bos_token is added
