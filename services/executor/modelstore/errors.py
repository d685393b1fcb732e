"""The model store's one exception."""

from __future__ import annotations


class ModelError(Exception):
    """The model cannot be opened. The message is one sentence for the operator, with what to do where that is known."""
