"""Models from the Hugging Face hub, or from its cache on this machine."""

from __future__ import annotations

from pathlib import Path

from services.executor.modelstore.errors import ModelError

_WANTED = ["*.safetensors", "*.json", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]  # the same weights again, in another layout


def download(hub_id: str, revision: str | None) -> Path:
    """The snapshot's folder. Raises ModelError when it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except HFValidationError as error:
        raise ModelError(f"{hub_id} is not a hub id: {error}") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{hub_id} is not on this machine and the hub cannot be reached; give a folder or a .gguf file instead"
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(f"the hub refuses {hub_id}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise ModelError(f"{hub_id} cannot be downloaded: {error}") from error
