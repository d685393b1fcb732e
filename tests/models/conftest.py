"""The default model, ours and transformers', each read once."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from services.executor.modelstore.packed import PackedModel
from services.executor.modelstore.source import find_source
from services.executor.modelstore.store import open_model
from tests.models.tiny import round_parameters


@pytest.fixture(scope="session")
def smollm2() -> PackedModel:
    return open_model(None)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    path = find_source(None).path
    assert path is not None
    return path


@pytest.fixture(scope="session")
def transformers_smollm2(smollm2_gguf: Path) -> transformers.PreTrainedModel:
    """In float32, with the parameters that transformers reads from the file rounded once to bfloat16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    return round_parameters(model)
