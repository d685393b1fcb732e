"""The default model, ours and transformers', each read once."""

from __future__ import annotations

import pytest
import transformers

from services.executor.modelstore.packed import PackedModel
from services.executor.modelstore.store import open_model
from tests.models.parity import load_transformers


@pytest.fixture(scope="session")
def smollm2() -> PackedModel:
    return open_model(None)


@pytest.fixture(scope="session")
def transformers_smollm2() -> transformers.PreTrainedModel:
    return load_transformers()
