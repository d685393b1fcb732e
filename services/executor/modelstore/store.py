"""Opens a model by name: from the cache at once, else after one conversion.

A conversion happens in a folder of its own beside the wanted one and is renamed into place, under
a lock; whoever opens a model sees a whole one or none. Opening a converted model reads three small
files and maps the weights: no model library is imported for it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from services.executor.modelstore.errors import ModelError
from services.executor.modelstore.packed import PackedModel, Tensor, TensorKind, Weights, open_packed
from services.executor.modelstore.report import ConversionReport
from services.executor.modelstore.source import Source, SourceKind, find_source

if TYPE_CHECKING:
    from services.executor.modelstore.checkpoint import Checkpoint

__all__ = ["ModelError", "PackedModel", "Tensor", "TensorKind", "Weights", "default_cache_dir", "open_model"]


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/pagehold/models`, else `~/.cache/pagehold/models`."""
    base = os.environ.get("XDG_CACHE_HOME")  # the desktop convention's variable, not one of ours
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "pagehold" / "models"


def open_model(
    name: str | None, cache_dir: Path | None = None, progress: bool = True, weights: Weights = Weights.BFLOAT16
) -> PackedModel:
    """The model of that name, mapped.

    name: a folder in the Hugging Face layout, a `.gguf` file, a hub id `owner/name[@revision]`,
        or None for the default model.
    progress: a first conversion reports itself on stderr.

    Raises ModelError with one sentence: no such model, an unsupported one, damaged files, no room.
    """
    cache = cache_dir if cache_dir is not None else default_cache_dir()
    try:
        source = find_source(name)
        if weights is Weights.FILE and source.kind is not SourceKind.GGUF:
            weights = Weights.BFLOAT16  # other files have no blocks
        suffix = "" if weights is Weights.BFLOAT16 else f"-{weights}"
        folder = cache / f"{re.sub(r'[^A-Za-z0-9._-]+', '--', source.name)}-{source.key()}{suffix}"
        model = _open_cached(folder)
        if model is not None:
            return model
        return _convert(source, folder, ConversionReport(source.name, progress), weights)
    except OSError as error:
        shown = str(name)[:200] if name is not None else "the default model"
        raise ModelError(f"cannot prepare {shown} in {cache}: {error.strerror or error}") from error


def _open_cached(folder: Path) -> PackedModel | None:
    """None where there is no conversion, or a damaged one: it is made again."""
    try:
        return open_packed(folder)
    except (FileNotFoundError, NotADirectoryError, ModelError):
        return None


def _convert(source: Source, folder: Path, report: ConversionReport, weights: Weights) -> PackedModel:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock"), report):
        model = _open_cached(folder)  # another process may have converted it while this one waited
        if model is not None:
            return model
        for leftover in folder.parent.glob(f"{folder.name}.*.partial"):  # of a process that died
            shutil.rmtree(leftover, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
        try:
            # Imported here: the libraries that read models are slow to load, and needed only once.
            from services.executor.modelstore.convert import convert

            with report:
                checkpoint = _checkpoint(source)
                convert(checkpoint, source.name, str(source), partial, report.advance, weights)
            partial.chmod(0o755)
            if folder.exists():  # damaged; a process that has it mapped keeps its files
                folder.rename(partial.with_name(f"{partial.name}.old.partial"))
            partial.rename(folder)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"{source} is malformed: {type(error).__name__}: {error}") from error
        finally:
            for leftover in folder.parent.glob(f"{folder.name}.*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
        return open_packed(folder)


@contextmanager
def _locked(path: Path, report: ConversionReport) -> Iterator[None]:
    """Holds the conversion's lock. The file stays: removing it would race with the next holder."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report.say("another process is converting it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _checkpoint(source: Source) -> Checkpoint:
    if source.kind is SourceKind.GGUF:
        from services.executor.modelstore.gguf_file import GgufCheckpoint

        assert source.path is not None
        return GgufCheckpoint(source.path)
    from services.executor.modelstore.huggingface import HuggingFaceCheckpoint

    path = source.path
    if path is None:
        from services.executor.modelstore.hub import download

        assert source.hub_id is not None
        path = download(source.hub_id, source.revision)
    return HuggingFaceCheckpoint(path)
