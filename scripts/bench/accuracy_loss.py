"""Perplexity and greedy agreement of the CPU runner's encodings, on English text that Python brings along.

The base is float32 arithmetic over the model's bfloat16 weights and float32 pages. Perplexity is the exponential of the
mean negative log-probability of each passage's next tokens; agreement is the share of positions with the same most
likely token as the base. "rounded" hides the file's own blocks, as if the model had come without any.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from kvmanager.layout import KvDtype
from services.executor.modelstore.checkpoint import BF16, Checkpoint, Part
from services.executor.modelstore.convert import convert
from services.executor.modelstore.gguf_file import GgufCheckpoint
from services.executor.modelstore.packed import PackedModel, Weights, open_packed
from services.executor.modelstore.source import SourceKind, find_source
from services.executor.modelstore.store import ModelError, open_model
from services.executor.runner.base import Chunk, Lane, SamplingParams
from services.executor.runner.cpu import CpuRunner

PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute."""

    name: str
    weights: Weights
    rounded: bool
    dtype: str
    kv_dtype: str


BASE = Variant("float32", Weights.BFLOAT16, False, "float32", "float32")
VARIANTS = (
    Variant("bfloat16", Weights.BFLOAT16, False, "bfloat16", "bfloat16"),
    Variant("auto", Weights.FILE, False, "bfloat16", "bfloat16"),
    Variant("auto, int8 pages", Weights.FILE, False, "bfloat16", "int8"),
    Variant("int8", Weights.INT8, False, "bfloat16", "bfloat16"),
    Variant("int8, int8 pages", Weights.INT8, False, "bfloat16", "int8"),
    Variant("int4", Weights.INT4_INTEGERS, False, "bfloat16", "bfloat16"),
    Variant("int4, int8 pages", Weights.INT4_INTEGERS, False, "bfloat16", "int8"),
    Variant("int4, rounded", Weights.INT4_INTEGERS, True, "bfloat16", "bfloat16"),
    Variant("int4 by tiles", Weights.INT4, False, "bfloat16", "bfloat16"),
)


@dataclass(frozen=True, slots=True)
class Loss:
    """Of one variant against the base."""

    variant: str
    megabytes: float  # of weights
    perplexity: float
    increase: float  # of the perplexity
    agreement: float


class _WithoutBlocks(Checkpoint):
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.spec, self.tokens = checkpoint.spec, checkpoint.tokens
        self._checkpoint = checkpoint

    def read(self, part: Part, layer: int | None = None) -> BF16:
        return self._checkpoint.read(part, layer)


@contextmanager
def opened(name: str | None, variant: Variant) -> Iterator[PackedModel]:
    source = find_source(name)
    if not variant.rounded or source.kind is not SourceKind.GGUF or source.path is None:
        yield open_model(name, weights=variant.weights)
        return
    with tempfile.TemporaryDirectory(prefix="pagehold-accuracy-") as folder:
        checkpoint = _WithoutBlocks(GgufCheckpoint(source.path))
        convert(checkpoint, source.name, str(source), Path(folder), lambda done, total: None, variant.weights)
        yield open_packed(Path(folder))


def passages(model: PackedModel, count: int, length: int) -> list[list[int]]:
    """Token ids, spread over the text."""
    topics = pydoc_data.topics.topics
    tokenizer = Tokenizer.from_buffer(model.tokenizer_json)
    ids = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False).ids
    stride = (len(ids) - length) // max(count - 1, 1)
    if stride < length:
        raise SystemExit(f"the text has {len(ids)} tokens: ask for fewer or shorter passages")
    return [ids[i * stride : i * stride + length] for i in range(count)]


def log_probabilities(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    """float64 [len(tokens) - 1]: of each next token. logits: [len(tokens), vocab]."""
    wide = logits[:-1].astype(np.float64)
    most = wide.max(axis=-1, keepdims=True)
    total = np.log(np.exp(wide - most).sum(axis=-1)) + most[:, 0]
    return wide[np.arange(len(wide)), tokens[1:]] - total


def judge(model: PackedModel, variant: Variant, texts: list[list[int]]) -> tuple[float, np.ndarray]:
    """Perplexity, and the most likely token after each position."""
    runner = CpuRunner(model, variant.dtype, variant.kv_dtype, threads=2)
    pages = -(-len(texts[0]) // PAGE_SIZE) + 1
    spec, kv_dtype = model.spec, KvDtype[variant.kv_dtype.upper()]
    page_bytes = spec.layers * 2 * spec.kv_heads * PAGE_SIZE * kv_dtype.slot_bytes(spec.head_dim)
    runner.map_pool(memoryview(bytearray(page_bytes * pages)), pages, PAGE_SIZE)
    row = np.arange(1, pages, dtype=np.uint64)
    likely, scores = [], []
    for text in texts:
        lane = Lane(np.array(text, np.uint32), len(text), 0, SamplingParams(temperature=0.0), row)
        runner.prepare(lane, len(text))
        logits = runner.logits([Chunk(lane, 0, len(text), 0, False)])
        likely.append(logits.argmax(axis=-1))
        scores.append(log_probabilities(logits, text))
    runner.close()
    return float(np.exp(-np.concatenate(scores).mean())), np.concatenate(likely)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/accuracy", description=__doc__)
    parser.add_argument("--model", help="folder, .gguf file or hub id; default: the default model")
    parser.add_argument("--passages", type=int, default=24)
    parser.add_argument("--length", type=int, default=512, help="tokens of a passage")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    losses: list[Loss] = []
    try:
        with opened(asked.model, BASE) as model:
            texts = passages(model, asked.passages, asked.length)
            base, wanted = judge(model, BASE, texts)
        for variant in VARIANTS:
            with opened(asked.model, variant) as model:
                perplexity, likely = judge(model, variant, texts)
                size = model.weights.nbytes / 1e6
            losses.append(Loss(variant.name, size, perplexity, perplexity / base - 1, float((likely == wanted).mean())))
    except ModelError as error:
        raise SystemExit(f"scripts/bench/accuracy: {error}") from error
    if asked.json:
        print(json.dumps([asdict(loss) for loss in losses], indent=1))
        return
    print(f"{asked.passages} passages of {asked.length} tokens; float32: perplexity {base:.4f}")
    print(f"{'weights':<16} {'MB':>6} {'perplexity':>11} {'increase':>9} {'agreement':>10}")
    for loss in losses:
        print(
            f"{loss.variant:<16} {loss.megabytes:>6.0f} {loss.perplexity:>11.4f} {loss.increase:>9.2%} "
            f"{loss.agreement:>10.2%}"
        )


if __name__ == "__main__":
    main()
