"""Folders in the Hugging Face layout: weights, shards, tokens, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from services.executor.modelstore.report import ConversionReport
from services.executor.modelstore.store import ModelError, open_model
from tests.models.tiny import TEMPLATE, TINY, Tiny, save_tiny
from tests.models.unpacking import assert_same_weights

LLAMA = TINY[0]


def edit(path: Path, **changes: object) -> None:
    """Sets keys of a JSON file; None takes a key away."""
    data = json.loads(path.read_text()) if path.exists() else {}
    data.update(changes)
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


@pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.name)
def test_weights_are_the_models_rounded_once(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[tuple[int, int]] = []
    monkeypatch.setattr(ConversionReport, "advance", lambda _, done, total: reported.append((done, total)))
    rounded = save_tiny(tiny, tmp_path / "m")
    model = open_model(str(tmp_path / "m"), tmp_path / "cache", progress=False)
    count = len(model.tensors)
    assert reported == [(i + 1, count) for i in range(count)]
    assert_same_weights(model, rounded.state_dict())
    assert all(tensor.offset % 4096 == 0 for tensor in model.tensors.values())
    frequencies = rounded.model.rotary_emb.inv_freq.numpy()
    assert model.spec.inverse_frequencies() == pytest.approx(frequencies, rel=1e-6)


def test_half_precision_and_shards_give_the_same_model(tmp_path: Path) -> None:
    rounded = save_tiny(LLAMA, tmp_path / "one")
    whole = open_model(str(tmp_path / "one"), tmp_path / "cache", progress=False)
    rounded.to(torch.bfloat16).save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "many" / file).write_bytes((tmp_path / "one" / file).read_bytes())
    sharded = open_model(str(tmp_path / "many"), tmp_path / "cache", progress=False)
    assert sharded.fingerprint == whole.fingerprint
    next((tmp_path / "many").glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match="incomplete"):
        open_model(str(tmp_path / "many"), tmp_path / "other", progress=False)


def test_float16_is_widened_before_rounding(tmp_path: Path) -> None:
    rounded = save_tiny(LLAMA, tmp_path / "m")
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float16)
    half.save_pretrained(tmp_path / "m")
    del rounded
    model = open_model(str(tmp_path / "m"), tmp_path / "cache", progress=False)
    assert_same_weights(model, {name: tensor.float().to(torch.bfloat16) for name, tensor in half.state_dict().items()})


def test_tokens(tmp_path: Path) -> None:
    save_tiny(LLAMA, tmp_path / "m")
    edit(tmp_path / "m" / "generation_config.json", eos_token_id=[5, 2])
    model = open_model(str(tmp_path / "m"), tmp_path / "cache", progress=False)
    assert model.name == "m"
    assert model.eos_token_ids == (5, 2, 0)  # generation_config's, config's, and <|endoftext|>
    assert (model.bos_token_id, model.add_bos_token) == (1, False)
    assert model.special_tokens["bos_token"] == "<|im_start|>"
    assert model.special_tokens["eos_token"] == "<|im_end|>"
    assert model.chat_template == TEMPLATE
    assert model.tokenizer_json == (tmp_path / "m" / "tokenizer.json").read_bytes()

    edit(tmp_path / "m" / "tokenizer_config.json", add_bos_token=True)
    assert open_model(str(tmp_path / "m"), tmp_path / "cache", progress=False).add_bos_token


def test_bos_of_a_post_processor_is_found(tmp_path: Path) -> None:
    save_tiny(LLAMA, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    data = json.loads(path.read_text())
    name = "<|im_start|>"
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [1], "tokens": [name]}},
    }
    path.write_text(json.dumps(data))
    assert open_model(str(tmp_path / "m"), tmp_path / "cache", progress=False).add_bos_token


@pytest.mark.parametrize("where", ["tokenizer_config", "named", "none"])
def test_older_places_of_the_chat_template(where: str, tmp_path: Path) -> None:
    save_tiny(LLAMA, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    value = {"tokenizer_config": TEMPLATE, "named": named, "none": None}[where]
    edit(tmp_path / "m" / "tokenizer_config.json", chat_template=value)
    model = open_model(str(tmp_path / "m"), tmp_path / "cache", progress=False)
    assert model.chat_template == ("" if where == "none" else TEMPLATE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"no tensor model\.layers\.2\.input_layernorm\.weight"),
        ({"intermediate_size": 120}, r"gate of layer 0 has the shape \(112, 72\), its description says \(120, 72\)"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"head_dim": [1]}, "malformed"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    save_tiny(LLAMA, tmp_path / "m")
    edit(tmp_path / "m" / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        open_model(str(tmp_path / "m"), tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", b"{}", "tokenizer.json cannot be read"),
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "config.json cannot be read"),
        ("config.json", b"[]", "does not hold a JSON object"),
        ("model.safetensors", None, r"no \*\.safetensors"),
        ("model.safetensors", b"\x00" * 64, "cannot be read"),
    ],
)
def test_damaged_files_get_one_clear_error(file: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    save_tiny(LLAMA, tmp_path / "m")
    if content is None:
        (tmp_path / "m" / file).unlink()
    else:
        (tmp_path / "m" / file).write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        open_model(str(tmp_path / "m"), tmp_path / "cache", progress=False)
    assert "\n" not in str(caught.value)
