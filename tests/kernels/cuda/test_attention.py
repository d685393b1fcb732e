"""Paged attention equals the reference, reads nothing that it must not, and does not depend on what it must not."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import pytest
import torch

from kernels.cuda.attention import HEAD_DIMS, AttentionKernel, AttentionShape, Kind, PagedAttention, fit
from kernels.cuda.attention_plan import SharedPrefix
from kernels.cuda.ladder.decode import LadderDecode
from tests.kernels.cuda.attention_cases import Capacity, Sequences, Span
from tests.kernels.cuda.host import HostDevice

PLAIN: Final = AttentionShape(8, 2, 128, 16, "bfloat16", "bfloat16")
FP8: Final = AttentionShape(8, 1, 128, 16, "bfloat16", "fp8_e4m3")
WINDOW: Final = AttentionShape(6, 2, 64, 8, "float16", "float16", window=100)
# Every head size, page size, page type, group and option at least once; 40 heads are two blocks' rows.
SHAPES: Final = {
    "plain": PLAIN,
    "fp8": FP8,
    "window": WINDOW,
    "softcap": AttentionShape(2, 2, 80, 32, "float16", "fp8_e4m3", softcap=3.0),
    "both": AttentionShape(4, 2, 256, 128, "bfloat16", "bfloat16", window=7, softcap=30.0),
    "alibi": AttentionShape(40, 1, 96, 64, "bfloat16", "float16", alibi=True),
    "long": AttentionShape(3, 1, 64, 8, "float16", "bfloat16"),
}
TOLERANCE: Final = {"bfloat16": 4e-3, "float16": 1e-3}  # relative to the largest value; 2^-8 and 2^-11 are half a place
SPANS: Final[dict[Kind, list[Span]]] = {
    "decode": [(0, 1), (70, 1), (298, 2), (127, 1), (63, 1)],
    "append": [(0, 1), (70, 40), (250, 1), (0, 50), (127, 3)],
}


def tolerance(shape: AttentionShape) -> float:
    # Weights are rounded to the type of the pages, or to float16 for fp8.
    return max(TOLERANCE[shape.dtype], TOLERANCE.get(shape.kv_dtype, 0.0))


@pytest.mark.parametrize("kind", ["decode", "append"])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_equals_the_reference(host: HostDevice, name: str, kind: Kind) -> None:
    shape = SHAPES[name]
    kernel = PagedAttention(host, shape, kind)
    spans = [(start, min(count, kernel.rows) if kind == "decode" else count) for start, count in SPANS[kind]]
    if name == "long":  # so many pages that their ids are fetched three times
        spans = [(2100, 1), *spans]
    for splits, layer_major in ((False, False), (True, True)):
        sequences = Sequences(shape, spans, seed=splits, layer_major=layer_major)
        output = sequences.run([kernel], resident_items=64 if splits else 1, capacity=Capacity(partials=600))
        assert shape.window or (sequences.counts.partials > 0) == splits
        assert sequences.error(output) <= tolerance(shape)


@pytest.mark.parametrize("schedule", ["reverse", "random:1", "random:2"])
def test_the_order_of_threads_and_blocks_changes_nothing(host: HostDevice, host_cache: Path, schedule: str) -> None:
    scheduled = HostDevice(host_cache, schedule=schedule)
    for kind, shape in (("decode", PLAIN), ("append", FP8)):
        sequences = Sequences(shape, SPANS[kind])
        outputs = [sequences.run([PagedAttention(d, shape, kind)], resident_items=64) for d in (host, scheduled)]
        assert torch.equal(*outputs)


def test_a_device_with_little_shared_memory_has_one_stage(host_cache: Path) -> None:
    shape, device = SHAPES["both"], HostDevice(host_cache, compute_capability=80)
    assert fit(shape, "append", 64, 80).stages == 1
    sequences = Sequences(shape, [(70, 40), (130, 1)])
    assert sequences.error(sequences.run([PagedAttention(device, shape, "append")])) <= tolerance(shape)


def test_decodes_and_prompts_share_a_plan(host: HostDevice) -> None:
    kernels = [PagedAttention(host, PLAIN, kind) for kind in ("append", "decode")]
    sequences = Sequences(PLAIN, [(200, 1), (180, 40), (64, 1), (150, 2)])
    assert sequences.error(sequences.run(kernels, resident_items=16)) <= tolerance(PLAIN)
    assert sequences.counts.decode_items > 3 and sequences.counts.append_items > 1


@pytest.mark.parametrize("resident_items", [1, 64])
def test_a_shared_prefix_is_read_for_all_and_merged(host: HostDevice, resident_items: int) -> None:
    kernels = [PagedAttention(host, PLAIN, kind) for kind in ("append", "decode")]
    spans = [(300, 1), (150, 1), (129, 1), (220, 1), (80, 1)]
    sequences = Sequences(PLAIN, spans, shared=128)
    output = sequences.run(kernels, prefixes=[SharedPrefix(0, 4, 128)], resident_items=resident_items)
    assert sequences.counts.append_items == 1
    assert sequences.counts.partials == 4 * 2 if resident_items == 1 else sequences.counts.partials > 8
    assert sequences.error(output) <= tolerance(PLAIN)


@pytest.mark.parametrize("shape", [PLAIN, WINDOW], ids=["plain", "window"])
def test_with_fixed_splits_a_query_depends_on_its_sequence_alone(host: HostDevice, shape: AttentionShape) -> None:
    wide, narrow = (PagedAttention(host, shape, "append", row_tiles=tiles) for tiles in (2, 1))
    many = Capacity(partials=2000)

    def run(sequences: Sequences, kernel: AttentionKernel) -> torch.Tensor:
        return sequences.run([kernel], fixed_split=64, capacity=many)

    both = Sequences(shape, [(0, 210), (0, 20)])
    whole = run(both, wide)
    assert both.error(whole) <= tolerance(shape)
    assert torch.equal(run(both, narrow), whole)
    # In chunks that cut queries, tiles and splits elsewhere, decode by decode, in other company.
    steps = [
        [(0, 0, 65)],
        [(1, 0, 20), (0, 65, 1)],
        [(0, 66, 90)],
        [(0, 156, 53), (1, 19, 1)],
        [(1, 10, 2), (0, 209, 1)],
    ]
    for number, step in enumerate(steps):
        output = run(both.part(step), narrow if number % 2 else wide)
        expected = torch.cat([whole[row * 210 :][start : start + n] for row, start, n in step])
        assert torch.equal(output, expected)


@pytest.mark.parametrize("version", [1, 2])
def test_the_ladder_computes_the_same(host: HostDevice, version: Literal[1, 2]) -> None:
    shape = AttentionShape(3, 1, 80, 8, "float16", "fp8_e4m3")
    sequences = Sequences(shape, [(0, 1), (70, 1), (299, 1), (128, 1)])
    assert sequences.error(sequences.run([LadderDecode(host, shape, version)])) <= tolerance(shape)


@pytest.mark.parametrize("compute_capability", [80, 90, 100])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_blocks_fit_a_multiprocessor(compute_capability: int, head_dim: int) -> None:
    most = 163 if compute_capability == 80 else 227  # KiB of a block
    for kv_dtype in ("bfloat16", "fp8_e4m3"):
        shape = AttentionShape(4, 1, head_dim, 16, "bfloat16", kv_dtype)
        for kind, rows in (("decode", 16), ("decode", 32), ("append", 64), ("append", 128)):
            if rows in (32, 128) and head_dim == 256:
                continue
            blocks = fit(shape, kind, rows, compute_capability)
            assert blocks.shared_bytes <= most * 1024
            assert blocks.resident * (blocks.shared_bytes + 1024) <= (most + 1) * 1024
    if compute_capability == 90 and head_dim <= 128:
        # Bytes on their way to a multiprocessor while tiles are computed.
        tile = 64 * shape.token_bytes
        assert (fit(shape, "decode", 16, 90).stages - 1) * fit(shape, "decode", 16, 90).resident * tile >= 48 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [({"head_dim": 100}, "heads of 100"), ({"page_size": 24}, "pages of 24"), ({"heads": 7}, "no multiple of 2")],
)
def test_shapes_that_no_kernel_has_are_refused(change: dict[str, int], message: str) -> None:
    usual = {"heads": 8, "kv_heads": 2, "head_dim": 128, "page_size": 16}
    with pytest.raises(ValueError, match=message):
        AttentionShape(**{**usual, **change}, dtype="bfloat16", kv_dtype="bfloat16")
