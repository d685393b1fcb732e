"""The public Python package: `from pagehold import Client`."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Client", "__version__"]

if TYPE_CHECKING:
    from pagehold.client import Client


def __getattr__(name: str) -> object:
    # Lazy, so that a process which only wants the messages does not load the client.
    if name == "Client":
        from pagehold.client import Client

        return Client
    raise AttributeError(name)
