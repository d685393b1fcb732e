"""A .gguf file as a folder in the Hugging Face layout, written once by transformers: what the peers load.

Run as a process of its own: `python -m peers_lib.convert FILE.gguf FOLDER`.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any


def convert(source: Path, folder: Path) -> None:
    """Weights are rounded once to bfloat16, as Pagehold's own conversion does. No tokenizer: requests are token ids."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    read = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    # A model read from a quantized file refuses to be saved even when it holds plain weights: move them to a new one.
    model = transformers.AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    # Whole or not at all: an interrupted conversion leaves nothing that looks like a model.
    partial.rename(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
