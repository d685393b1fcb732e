"""K/V and logits depend on the tokens before them alone: not on chunks, batch, threads or pages. Bit for bit."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu.native import ModelShape, NativeModel, NativeSampling
from tests.kernels.variants import (
    GROUPED,
    PLAIN,
    WINDOWED,
    Pages,
    Sequence,
    Variant,
    as_chunks,
    random_tensors,
)

LENGTH = 150  # more than one part of attention
LONG = 1400  # so many that a context is cut for several threads
MATES = 31


@dataclass
class Bench:
    """One model at 1 and at 2 threads, and what the sequence under test is when decoded alone."""

    shape: ModelShape
    kv_dtype: str
    models: dict[int, NativeModel]
    logits: np.ndarray  # float32 [LENGTH, vocab]
    held: np.ndarray  # bytes [LENGTH, ...]
    sampled: tuple[int, float]  # after the last position

    def pages(self, threads: int, page_size: int = 16, pages: int = 500) -> Pages:
        return Pages(self.models[threads], self.shape, self.kv_dtype, pages, page_size)

    def check(self, logits: np.ndarray, first: int = 0) -> None:
        np.testing.assert_array_equal(logits.view(np.uint32), self.logits[first : first + len(logits)].view(np.uint32))

    def check_held(self, pages: Pages, row: np.ndarray, length: int = LENGTH) -> None:
        np.testing.assert_array_equal(pages.held(row, length), self.held[:length])


def tokens_of(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, GROUPED.vocab, length).astype(np.uint32)


def sequence(pages: Pages, seed: int = 0, length: int = LENGTH) -> Sequence:
    sampling = replace(PLAIN, temperature=0.8, seed=seed, prompt_length=length)
    return Sequence(tokens_of(seed, length), pages.row(length), NativeSampling(sampling))


def step(model: NativeModel, chunk: tuple[int, ...]) -> tuple[int, float]:
    tokens, logprobs = np.zeros(1, np.uint32), np.zeros(1, np.float32)
    model.step(as_chunks([chunk]), tokens, logprobs)
    return int(tokens[0]), float(logprobs[0])


# Of the arithmetic, by the type of the pages.
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16"}


@pytest.fixture(
    scope="module", params=[f"{shape}-{kv_dtype}" for shape in ("grouped", "windowed") for kv_dtype in DTYPES]
)
def bench(request: pytest.FixtureRequest, variant: Variant) -> Iterator[Bench]:
    name, kv_dtype = request.param.split("-")
    shape = {"grouped": GROUPED, "windowed": WINDOWED}[name]
    tensors = random_tensors(shape)
    models = {threads: variant.model(shape, tensors, DTYPES[kv_dtype], threads, kv_dtype) for threads in (1, 2)}
    bench = Bench(shape, kv_dtype, models, np.empty(0), np.empty(0), (0, 0.0))
    pages = bench.pages(1)
    alone = sequence(pages)
    bench.logits = np.concatenate([models[1].logits(as_chunks([alone.chunk(i, 1)])) for i in range(LENGTH)])
    bench.held = pages.held(alone.row, LENGTH)
    assert np.isfinite(bench.logits).all() and bench.logits.std() > 0.1
    bench.sampled = step(models[1], alone.chunk(LENGTH - 1, 1, write_from=LENGTH, sample=True))
    yield bench
    for model in models.values():
        model.close()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [1, 16, 64, LENGTH])
def test_chunks(bench: Bench, size: int, threads: int) -> None:
    pages = bench.pages(threads)
    lane = sequence(pages)
    for start in range(0, LENGTH, size):
        count = min(size, LENGTH - start)
        bench.check(bench.models[threads].logits(as_chunks([lane.chunk(start, count)])), start)
    bench.check_held(pages, lane.row)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_of_32(bench: Bench, threads: int) -> None:
    """Decodes, with mates that decode at other positions."""
    model, pages = bench.models[threads], bench.pages(threads)
    lane = sequence(pages)
    mates = [sequence(pages, seed, length=50) for seed in range(1, MATES + 1)]
    model.logits(as_chunks([lane.chunk(0, LENGTH - 40), *(mate.chunk(0, 10) for mate in mates)]))
    for i in range(40):
        at = LENGTH - 40 + i
        batch = [mate.chunk(10 + i, 1) for mate in mates]
        batch.insert(i % 32, lane.chunk(at, 1))
        bench.check(model.logits(as_chunks(batch))[i % 32 : i % 32 + 1], at)
    bench.check_held(pages, lane.row)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_way_to_compute_it(bench: Bench, data: st.DataObject) -> None:
    """Any chunks, any mates in each step, any page size, 1 or 2 threads."""
    threads = data.draw(st.sampled_from([1, 2]), "threads")
    model = bench.models[threads]
    pages = bench.pages(threads, data.draw(st.sampled_from([8, 16, 64]), "page size"))
    lane, start = sequence(pages), 0
    mates = [(sequence(pages, seed), 0) for seed in range(1, data.draw(st.integers(1, 6), "mates"))]
    while start < LENGTH:
        count = data.draw(st.one_of(st.integers(1, 5), st.integers(1, LENGTH)), "count")
        count = min(count, LENGTH - start)
        batch = []
        for i, (mate, at) in enumerate(mates):
            more = min(data.draw(st.integers(1, 20), "mate's count"), LENGTH - at)
            if more:
                batch.append(mate.chunk(at, more))
                mates[i] = mate, at + more
        where = data.draw(st.integers(0, len(batch)), "place")
        before = sum(int(chunk[4]) for chunk in batch[:where])
        batch.insert(where, lane.chunk(start, count))
        bench.check(model.logits(as_chunks(batch))[before : before + count], start)
        start += count
    bench.check_held(pages, lane.row)


@pytest.mark.parametrize("shared", [16, 64, 128])
def test_a_prefix_hit(bench: Bench, shared: int) -> None:
    """Another sequence's pages in front; what they hold is not written again."""
    model, pages = bench.models[1], bench.pages(1)
    owner = sequence(pages)
    model.logits(as_chunks([owner.chunk(0, shared)]))
    lane = sequence(pages)
    lane.row[: shared // 16] = owner.row[: shared // 16]
    bench.check(model.logits(as_chunks([lane.chunk(shared, LENGTH - shared)])), shared)
    bench.check_held(pages, lane.row)


@pytest.mark.parametrize("start", [0, 60, LENGTH - 1])
def test_positions_whose_write_is_masked(bench: Bench, start: int) -> None:
    """Run again for their logits alone, as after a full prefix hit: equal, and no page is touched."""
    model, pages = bench.models[1], bench.pages(1)
    lane = sequence(pages)
    model.logits(as_chunks([lane.chunk(0, LENGTH)]))
    # Marked, so that a write of the same bytes would show: the position itself must be read from the page.
    marked = lane.row[(LENGTH - 1) // 16].astype(np.uint32), (LENGTH - 1) % 16
    before = pages.planes.copy()
    bench.check(model.logits(as_chunks([lane.chunk(start, LENGTH - start, write_from=LENGTH)])), start)
    np.testing.assert_array_equal(pages.planes, before)
    slots = pages.read()
    slots[marked[0], :, :, :, marked[1]] += 1
    pages.write(slots)
    before = pages.planes.copy()
    again = model.logits(as_chunks([lane.chunk(start, LENGTH - start, write_from=LENGTH)]))
    np.testing.assert_array_equal(pages.planes, before)
    bench.check(again[:-1], start)
    assert (again[-1] != bench.logits[-1]).any()


def test_a_chunk_that_writes_only_its_end(bench: Bench) -> None:
    model, pages = bench.models[1], bench.pages(1)
    lane = sequence(pages)
    model.logits(as_chunks([lane.chunk(0, 70)]))
    before = pages.held(lane.row, 70)
    bench.check(model.logits(as_chunks([lane.chunk(40, LENGTH - 40, write_from=70)])), 40)
    np.testing.assert_array_equal(pages.held(lane.row, 70), before)
    bench.check_held(pages, lane.row)


def test_recomputation_in_new_pages(bench: Bench) -> None:
    """After a preemption: what was prefilled and then decoded is prefilled in one go, elsewhere."""
    model, pages = bench.models[2], bench.pages(2)
    first, second = sequence(pages), sequence(pages)
    model.logits(as_chunks([first.chunk(0, 100)]))
    for i in range(100, 120):
        model.logits(as_chunks([first.chunk(i, 1)]))
    bench.check(model.logits(as_chunks([second.chunk(0, 121)])))
    for i in range(121, LENGTH):
        bench.check(model.logits(as_chunks([second.chunk(i, 1)])), i)
    bench.check_held(pages, second.row)


def test_signs_of_zeros(variant: Variant) -> None:
    """A product that underflows to -0 meets the next position's weight of 0 in a chunk, and nothing in a decode."""
    shape = replace(GROUPED, heads=2, qk_norm=False)  # a head of its own for each query: several queries share loads
    model = variant.attention(shape, "float32", "float32")
    try:
        pages = Pages(model, shape, "float32", 20, 16)
        lane = sequence(pages, length=60)
        parts = np.zeros((60, 3, shape.heads * shape.head_dim), np.float32)
        parts[:, 0] = 1
        parts[0, 1] = 1  # position 0 has nearly all the weight, and the value 0
        parts[1::2, 2], parts[2::2, 2] = -1e-45, 1e-45
        qkv = parts.reshape(60, -1)
        together = model.attend(0, as_chunks([lane.chunk(0, 60)]), qkv)
        alone = [model.attend(0, as_chunks([lane.chunk(i, 1)]), qkv[i : i + 1]) for i in range(60)]
        np.testing.assert_array_equal(np.concatenate(alone).view(np.uint32), together.view(np.uint32))
    finally:
        model.close()


@dataclass
class Context:
    """Attention of one layer over a long context: 1 thread, all positions in one chunk."""

    variant: Variant
    shape: ModelShape
    kv_dtype: str
    qkv: np.ndarray  # float32 [LONG, ...]
    output: np.ndarray  # float32 [LONG, heads * head_dim]

    def model(self, threads: int) -> NativeModel:
        return self.variant.attention(self.shape, DTYPES[self.kv_dtype], self.kv_dtype, threads)


@pytest.fixture(scope="module", params=["grouped-float32", "grouped-bfloat16", "grouped-int8", "windowed-bfloat16"])
def context(request: pytest.FixtureRequest, variant: Variant) -> Context:
    name, kv_dtype = request.param.split("-")
    window = {"grouped": 0, "windowed": 1200}[name]
    shape = replace(GROUPED, heads=4, max_positions=LONG, sliding_window=window, qk_norm=False)
    rng = np.random.default_rng(5)
    qkv = rng.normal(size=(LONG, (shape.heads + 2 * shape.kv_heads) * shape.head_dim)).astype(np.float32)
    context = Context(variant, shape, kv_dtype, qkv, np.empty(0))
    model = context.model(1)
    try:
        pages = Pages(model, shape, kv_dtype, 100, 16)
        lane = sequence(pages, length=LONG)
        context.output = model.attend(0, as_chunks([lane.chunk(0, LONG)]), qkv)
    finally:
        model.close()
    assert np.isfinite(context.output).all() and context.output.std() > 0.01
    return context


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_long_context_in_pieces(context: Context, threads: int) -> None:
    """A step is cut by threads and by what else it has: a decode, some positions, a chunk, each alone and together."""
    model = context.model(threads)
    try:
        pages = Pages(model, context.shape, context.kv_dtype, 500, 16)
        spans = [(LONG - 1, 1), (LONG - 9, 9), (1000, 70), (LONG // 2, 1), (1151, 2)]
        lanes = [sequence(pages, length=LONG) for _ in spans]
        for lane in lanes:
            model.attend(0, as_chunks([lane.chunk(0, LONG)]), context.qkv)
        chunks = [lane.chunk(start, count) for lane, (start, count) in zip(lanes, spans, strict=True)]
        rows = [context.qkv[start : start + count] for start, count in spans]
        wanted = [context.output[start : start + count] for start, count in spans]
        for batch in ([0], [1], [2], [3], [4], [0, 3], [0, 1, 2, 3, 4]):
            got = model.attend(0, as_chunks([chunks[i] for i in batch]), np.concatenate([rows[i] for i in batch]))
            expected = np.concatenate([wanted[i] for i in batch])
            np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    finally:
        model.close()


@pytest.mark.parametrize(("page_size", "threads"), [(16, 1), (16, 2), (24, 5)])
def test_prefixes_shared_in_a_batch(context: Context, page_size: int, threads: int) -> None:
    """Decodes and short chunks whose tables begin alike: with all the same pages, some of them, or none."""
    model = context.model(threads)
    try:
        pages = Pages(model, context.shape, context.kv_dtype, 1500, page_size)
        lanes, inputs, chunks, rows, wanted = [], [], [], [], []
        for i, shared in enumerate([0, 1290, 1290, 1290, 600, 600, 600, 600, 128, 100, 0, 0, 1024, 1024, 900, 1200]):
            lane, qkv = sequence(pages, length=LONG), np.random.default_rng(i).permuted(context.qkv, axis=0)
            parent = i // 2 if shared > 600 else 0  # a tree: some share the pages of one that shares
            same = shared // page_size
            if same:
                lane.row[:same] = lanes[parent].row[:same]
                qkv[: same * page_size] = inputs[parent][: same * page_size]
            alone = model.attend(0, as_chunks([lane.chunk(0, LONG, write_from=same * page_size)]), qkv)
            count = 1 if i % 4 else 1 + i % 5
            start = max(shared, LONG - 7 * i - count)
            lanes.append(lane)
            inputs.append(qkv)
            chunks.append(lane.chunk(start, count))
            rows.append(qkv[start : start + count])
            wanted.append(alone[start : start + count])
        order = np.random.default_rng(threads).permutation(len(chunks))
        got = model.attend(0, as_chunks([chunks[i] for i in order]), np.concatenate([rows[i] for i in order]))
        expected = np.concatenate([wanted[i] for i in order])
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    finally:
        model.close()


def test_another_library_that_uses_tiles(context: Context) -> None:
    """It shapes and drops the tile registers of the calling thread as it likes, between two calls."""
    model = context.model(1)
    try:
        pages = Pages(model, context.shape, context.kv_dtype, 100, 16)
        lane = sequence(pages, length=LONG)
        factor = torch.ones((512, 512), dtype=torch.bfloat16)
        for _ in range(3):
            output = model.attend(0, as_chunks([lane.chunk(0, LONG)]), context.qkv)
            np.testing.assert_array_equal(output.view(np.uint32), context.output.view(np.uint32))
            assert float((factor @ factor)[0, 0]) == 512
    finally:
        model.close()


def before_a_guard(table: np.ndarray) -> np.ndarray:
    """The same block table, at the end of memory that may be read."""
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    whole = np.frombuffer(memory, np.uint64)
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(whole.ctypes.data + mmap.PAGESIZE)
    assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    placed = whole[mmap.PAGESIZE // 8 - len(table) : mmap.PAGESIZE // 8]
    placed[:] = table
    return placed


def test_nothing_behind_a_block_table_is_looked_at(context: Context) -> None:
    """It may change while a step runs. Sequences of other lengths, which share what the shorter ones have."""
    model = context.model(2)
    try:
        pages = Pages(model, context.shape, context.kv_dtype, 800, 16)
        longest = sequence(pages, length=LONG)
        model.attend(0, as_chunks([longest.chunk(0, LONG)]), context.qkv)
        lengths = (LONG, 700, 690, 1100, 400, 401, 399, 900, 1025)
        tables = [before_a_guard(longest.row[: -(-length // 16)]) for length in lengths]
        lanes = [replace(longest, row=table) for table in tables]
        chunks = [lane.chunk(n - 1, 1, write_from=n) for lane, n in zip(lanes, lengths, strict=True)]
        rows = np.stack([context.qkv[n - 1] for n in lengths])
        together = model.attend(0, as_chunks(chunks), rows)
        for i, chunk in enumerate(chunks):
            alone = model.attend(0, as_chunks([chunk]), rows[i : i + 1])
            np.testing.assert_array_equal(together[i].view(np.uint32), alone[0].view(np.uint32))
    finally:
        model.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_sampling_in_a_batch(bench: Bench, threads: int) -> None:
    """The token and its log-probability, computed with the output head over other rows too."""
    model, pages = bench.models[threads], bench.pages(threads)
    lane = sequence(pages)
    mates = [sequence(pages, seed, length=20) for seed in range(1, MATES + 1)]
    batch = [mate.chunk(0, 20, sample=i % 3 > 0) for i, mate in enumerate(mates)]
    batch.insert(17, lane.chunk(0, LENGTH, sample=True))
    tokens, logprobs = np.zeros(32, np.uint32), np.zeros(32, np.float32)
    model.step(as_chunks(batch), tokens, logprobs)
    assert (int(tokens[17]), float(logprobs[17])) == bench.sampled
    unsampled = [i for i, chunk in enumerate(batch) if not chunk[-1]]
    assert not tokens[unsampled].any() and not logprobs[unsampled].any()
