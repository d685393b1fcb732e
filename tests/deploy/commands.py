"""Command lines as deployments have them, read as `pagehold` reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from unittest import mock

from pagehold.runtime.settings import SupervisorSettings
from services.cli.main import COMPONENTS, _read

PREFIX = "PAGEHOLD_"


def read_component(words: list[str], environment: Mapping[str, str]) -> SupervisorSettings:
    """words: behind `pagehold`. Fails for a flag, a value or a PAGEHOLD_ variable that this component does not have."""
    command, component, *_ = words
    assert command == "run"
    kind = COMPONENTS[component]
    for name in environment:
        if name.startswith(PREFIX):
            assert name.removeprefix(PREFIX).lower() in kind.model_fields, f"{component} knows no {name}"
    return read_shared(words, environment)


def read_shared(words: list[str], environment: Mapping[str, str]) -> SupervisorSettings:
    """The same with an environment that others have as well: what this component does not know is no mistake."""
    _, component, *flags = words
    outside = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    with mock.patch.dict(os.environ, {**outside, **environment}, clear=True):
        return _read(COMPONENTS[component], flags, f"run {component}")
