"""The CUDA runner on the stand-in for a GPU, measured by the reference runner: the same kernels, on the CPU.

All models have the same sizes, one a sliding window and a soft cap: each shape of attention is two compilations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvmanager.layout import Strides
from services.executor.modelstore.packed import PackedModel
from services.executor.modelstore.store import open_model
from services.executor.runner.base import Chunk, Lane, Runner, SamplingParams
from services.executor.runner.cuda import attention, weights
from services.executor.runner.cuda.limits import Limits
from services.executor.runner.cuda.pool import DeviceMemory, make_pool
from services.executor.runner.cuda.products import TorchProducts
from services.executor.runner.cuda.runner import CudaRunner
from services.executor.runner.reference import ReferenceRunner, _sample
from tests.device.host_driver import HostPlatform, make_device
from tests.models.paging import GREEDY, TestPool, chunks_of, greedy
from tests.models.tiny import Tiny, save_tiny

SHAPE = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = [
    Tiny("mistral", "mistral", SHAPE),
    Tiny("qwen2-tied", "qwen2", {**SHAPE, "tie_word_embeddings": True}),
    Tiny("qwen3", "qwen3", SHAPE),
]
PAGE_SIZE = 8
WINDOW = 40
LENGTH = 90
LIMITS = Limits(page_size=PAGE_SIZE, max_model_len=256, max_num_seqs=8, max_batch_tokens=96)
PAGES = 100


@pytest.fixture(scope="module")
def platform() -> HostPlatform:
    return HostPlatform(make_device())


@pytest.fixture(scope="module", params=MODELS, ids=lambda tiny: tiny.name)
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    opened = _open(request.param, tmp_path_factory.mktemp("cuda"))
    if request.param.kind != "mistral":
        return opened
    return replace(opened, spec=replace(opened.spec, sliding_window=WINDOW, logit_softcap=20.0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return _open(MODELS[0], tmp_path_factory.mktemp("cuda"))


def _open(tiny: Tiny, folder: Path) -> PackedModel:
    save_tiny(tiny, folder / "model")
    return open_model(str(folder / "model"), folder / "cache", progress=False)


def _runner(
    model: PackedModel, platform: HostPlatform, graphs: tuple[int, ...] = (), deterministic: bool = False
) -> CudaRunner:
    return CudaRunner(model, platform, LIMITS, "bfloat16", "bfloat16", deterministic, graphs)


@pytest.fixture(scope="module")
def eager(model: PackedModel, platform: HostPlatform) -> Iterator[CudaRunner]:
    runner = _runner(model, platform)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def fixed(model: PackedModel, platform: HostPlatform) -> Iterator[CudaRunner]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_LEAST_FIXED_SPLIT", 64)  # two of them in LENGTH
        runner = _runner(model, platform, deterministic=True)
    yield runner
    runner.close()


class _Pool(TestPool):
    """Lanes that are released at the end of a test."""

    def __init__(self, model: PackedModel, runner: Runner) -> None:
        super().__init__(model.spec, runner, "bfloat16", PAGES, PAGE_SIZE)
        self.lanes: list[Lane] = []

    def lane(self, tokens: list[int], capacity: int, sampling: SamplingParams = GREEDY) -> Lane:
        lane = super().lane(tokens, capacity, sampling)
        self.lanes.append(lane)
        return lane

    def release(self) -> None:
        for lane in self.lanes:
            self._runner.release(lane)


@pytest.fixture
def pools() -> Iterator[list[_Pool]]:
    made: list[_Pool] = []
    yield made
    for pool in made:
        pool.release()


def text(model: PackedModel, length: int, seed: int = 3) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.spec.vocab_size, length).tolist()


def test_logits_are_those_of_the_reference(any_model: PackedModel, platform: HostPlatform, pools: list[_Pool]) -> None:
    """Chunks and decodes of two sequences; the error is that of bfloat16, measured against float32."""
    found = []
    for runner in (_runner(any_model, platform), ReferenceRunner(any_model, "bfloat16")):
        pool = _Pool(any_model, runner)
        pools.append(pool)
        found.append(_mixed_logits(runner, pool, any_model))
    exact = ReferenceRunner(any_model, "float32")
    wide = TestPool(any_model.spec, exact, "float32", PAGES, PAGE_SIZE)
    wanted = _mixed_logits(exact, wide, any_model)
    ours, theirs = (float(np.std(logits - wanted)) for logits in found)
    largest = float(np.abs(found[0] - wanted).max())
    print(f"logit error {ours:.4f}, the reference's in bfloat16 {theirs:.4f}; largest {largest:.3f}")
    assert ours < 1.2 * theirs
    assert largest < 12 * theirs


def _mixed_logits(runner: Runner, pool: TestPool, model: PackedModel) -> np.ndarray:
    first, second = pool.lane(text(model, LENGTH), LENGTH), pool.lane(text(model, 40, 4), 40)
    parts = [
        runner.logits([Chunk(first, 0, 37, 0, True), Chunk(second, 0, 20, 0, True)]),
        runner.logits([Chunk(first, 37, 51, 37, True), Chunk(second, 20, 1, 20, True)]),
        runner.logits([Chunk(second, 21, 1, 21, True), Chunk(first, 88, 1, 88, True)]),
        runner.logits([Chunk(second, 22, 18, 22, True), Chunk(first, 89, 1, 89, True)]),
    ]
    return np.concatenate(parts)


def test_greedy_tokens_by_every_path(model: PackedModel, platform: HostPlatform, pools: list[_Pool]) -> None:
    """Graphs, kernel by kernel, and in chunks: each token is the reference's choice, or close to it."""
    prompts = [text(model, length, length) for length in (5, 24, 61)]
    for graphs, chunk in (((4,), None), ((), 16)):
        runner = _runner(model, platform, graphs)
        pool = _Pool(model, runner)
        pools.append(pool)
        outputs = greedy(runner, pool, prompts, 6, chunk)
        for prompt, output in zip(prompts, outputs, strict=True):
            _judge(model, prompt, output)


def _judge(model: PackedModel, prompt: list[int], output: list[int]) -> None:
    exact = ReferenceRunner(model, "float32")
    pool = TestPool(model.spec, exact, "float32", PAGES, PAGE_SIZE)
    lane = pool.lane(prompt + output[:-1], len(prompt) + len(output))
    logits = exact.logits([Chunk(lane, 0, len(prompt) + len(output) - 1, 0, True)])[len(prompt) - 1 :]
    gaps = logits.max(-1) - logits[np.arange(len(output)), output]
    assert gaps.max() < 0.15, f"the reference prefers another token by {gaps}"


def test_a_replay_equals_its_kernels(model: PackedModel, platform: HostPlatform, pools: list[_Pool]) -> None:
    """Sampled tokens, log-probabilities and pages, bit for bit, at every padding; one that fits no graph included."""
    asked = [GREEDY, SamplingParams(seed=5, logprobs=True), SamplingParams(temperature=0.7, top_k=20, seed=9)]
    seen = []
    for graphs in ((2, 4), ()):
        before = platform.captures
        runner = _runner(model, platform, graphs)
        pool = _Pool(model, runner)
        pools.append(pool)
        assert platform.captures - before == 2 * len(graphs)  # without shared prefixes, and with
        lanes = [pool.lane(text(model, 10 + i, i), 40, asked[i % 3]) for i in range(5)]
        results = [runner.step([chunk for lane in lanes for chunk in chunks_of(lane, lane.prompt_length, None)])]
        for count in (1, 2, 3, 4, 5):
            for lane, token in zip(lanes, results[-1].tokens, strict=False):
                lane.tokens[lane.prompt_length] = token
            results.append(runner.step([Chunk(lane, lane.prompt_length, 1, 0, True) for lane in lanes[:count]]))
        seen.append((results, pool.values[1:].copy()))
    (replayed, pages), (launched, other_pages) = seen
    for ours, theirs in zip(replayed, launched, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)
    assert (replayed[-1].logprobs[1::3] < 0).all() and not replayed[-1].logprobs[0]
    np.testing.assert_array_equal(pages.view(np.uint16), other_pages.view(np.uint16))


def test_a_step_may_be_submitted_before_its_predecessor_is_read(
    model: PackedModel, platform: HostPlatform, pools: list[_Pool]
) -> None:
    """The host never writes a token into the lane: the device goes on from its own."""
    runner = _runner(model, platform, (2,))
    outputs = []
    for ahead in (True, False):
        pool = _Pool(model, runner)
        pools.append(pool)
        lanes = [pool.lane(text(model, 12, i), 30, SamplingParams(seed=i)) for i in range(2)]
        flight = runner.submit([Chunk(lane, 0, 12, 0, True) for lane in lanes])
        tokens = []
        for position in range(12, 18):
            if not ahead:
                tokens.append(runner.collect(flight).tokens)
            following = runner.submit([Chunk(lane, position, 1, position, True) for lane in lanes])
            if ahead:
                tokens.append(runner.collect(flight).tokens)
            flight = following
        tokens.append(runner.collect(flight).tokens)
        outputs.append(np.array(tokens))
        pool.release()
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert len(np.unique(outputs[0])) > 4


def test_a_shared_prefix_is_read_once(model: PackedModel, platform: HostPlatform, pools: list[_Pool]) -> None:
    """Six of eight decodes have the same first pages, in two groups: the results are those of reading alone."""
    outputs = []
    for bandwidth in (1e9, 1e30):
        platform.bandwidth = bandwidth
        runner = _runner(model, platform, (8,))
        pool = _Pool(model, runner)
        pools.append(pool)
        lanes = [pool.lane(text(model, 75 + i, i % 4 // 2), 88) for i in range(8)]
        for i in (1, 4, 5):  # of the prompt of lane 0
            lanes[i].row = np.concatenate((lanes[0].row[:9], lanes[i].row[9:]))
        for i in (6, 7):
            lanes[i].row = np.concatenate((lanes[2].row[:8], lanes[i].row[8:]))
        for lane in lanes:
            runner.prepare(lane, lane.prompt_length)
        tokens = [runner.step([chunk]).tokens[0] for lane in lanes for chunk in chunks_of(lane, lane.prompt_length, 80)]
        decodes = [Chunk(lane, lane.prompt_length, 1, 0, True) for lane in lanes]
        prefixes = runner.steps.batch(decodes).prefixes
        assert [prefix.tokens for prefix in prefixes] == ([72, 64] if bandwidth < 1e12 else [])
        outputs.append((tokens, runner.step(decodes).tokens, runner.logits(decodes)))
    platform.bandwidth = 1e9
    (prompts, tokens, logits), (same_prompts, wanted, wanted_logits) = outputs
    assert prompts == same_prompts
    np.testing.assert_allclose(logits, wanted_logits, atol=0.1)
    assert logits.argmax(-1).tolist() == tokens.tolist() == wanted.tolist()


def test_sampling_is_that_of_the_reference(eager: CudaRunner, model: PackedModel, pools: list[_Pool]) -> None:
    """Parameters, biases, penalties and suppressed tokens reach the kernel: equal to the function over its logits."""
    pool = _Pool(model, eager)
    pools.append(pool)
    asked = [
        SamplingParams(seed=1 << 40, temperature=1.3, top_p=0.8, min_p=0.02),
        SamplingParams(temperature=0, repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.3),
        SamplingParams(temperature=0, logit_bias=((7, 60.0), (9, 61.0)), suppressed=(9, 9), min_tokens=1),
        SamplingParams(temperature=0, logit_bias=((7, 60.0), (9, 61.0)), suppressed=(9,), min_tokens=0),
    ]
    lanes = [pool.lane(text(model, 20, i), 22, params) for i, params in enumerate(asked)]
    chunks = [Chunk(lane, 0, 20, 0, True) for lane in lanes]
    tokens = eager.step(chunks).tokens
    logits = eager.logits(chunks).reshape(len(lanes), 20, -1)[:, -1]
    wanted = [_sample(chunk, row).token for chunk, row in zip(chunks, logits, strict=True)]
    assert tokens.tolist() == wanted
    assert tokens[2:].tolist() == [7, 9]


def test_a_masked_write_changes_no_page(eager: CudaRunner, model: PackedModel, pools: list[_Pool]) -> None:
    pool = _Pool(model, eager)
    pools.append(pool)
    lane = pool.lane(text(model, 30), 30)
    whole = eager.logits([Chunk(lane, 0, 30, 0, True)])
    before = pool.values.copy()
    again = eager.logits([Chunk(lane, 20, 10, 30, True)])
    np.testing.assert_array_equal(pool.values.view(np.uint16), before.view(np.uint16))
    np.testing.assert_allclose(again, whole[20:], atol=0.1)
    # The first 13 positions are marked, and stay so; the others are written again.
    pages = (lane.row & np.uint64(0xFFFF)).astype(int)
    slots = np.moveaxis(pool.values[pages], 4, 1).reshape(len(pages) * PAGE_SIZE, -1)
    pool.values[pages] += 1
    eager.logits([Chunk(lane, 0, 30, 13, True)])
    changed = np.moveaxis(pool.values[pages], 4, 1).reshape(len(pages) * PAGE_SIZE, -1)
    assert (changed[:13] == slots[:13] + 1).all()
    assert (np.abs((changed - slots)[13:30].astype(np.float32)).mean(-1) < 0.9).all()


def test_copied_slots_are_the_same_bits(eager: CudaRunner, model: PackedModel, pools: list[_Pool]) -> None:
    pool = _Pool(model, eager)
    pools.append(pool)
    lane = pool.lane(text(model, 8), 8)
    eager.step([Chunk(lane, 0, 8, 0, True)])
    page = int(lane.row[0] & np.uint64(0xFFFF))
    eager.copy_slots(page, 20, 5)
    source, target = pool.values[page].view(np.uint16), pool.values[20].view(np.uint16)
    np.testing.assert_array_equal(target[..., :5, :], source[..., :5, :])
    assert (target[..., 5:, :] == 0xFFFF).all() or np.isnan(pool.values[20][..., 5:, :].astype(np.float32)).all()


def test_pages_may_lie_layer_by_layer(eager: CudaRunner, model: PackedModel, pools: list[_Pool]) -> None:
    """The same bits in the other order; the runner takes the new pool for the old one."""
    spec, tokens = model.spec, text(model, 30)
    pool = _Pool(model, eager)
    wanted = eager.logits([Chunk(pool.lane(tokens, 30), 0, 30, 0, True)])
    pool.release()
    values = np.zeros((spec.layers, PAGES, 2, spec.kv_heads, PAGE_SIZE, spec.head_dim), np.uint16)
    half = values[0, 0, 0].nbytes
    strides = Strides(page=2 * half, layer=PAGES * 2 * half, half=half)
    eager.map_pool(memoryview(values).cast("B"), PAGES, PAGE_SIZE, strides)
    lane = pool.lane(tokens, 30)
    pools.append(pool)
    np.testing.assert_array_equal(eager.logits([Chunk(lane, 0, 30, 0, True)]), wanted)
    theirs = pool.values.view(np.uint16)
    np.testing.assert_array_equal(values[:, 5], theirs[1].reshape(values[:, 5].shape))
    eager.copy_slots(5, 50, 3)
    np.testing.assert_array_equal(values[:, 50, :, :, :3], theirs[1][..., :3, :])
    assert not values[:, 50, :, :, 3:].any()


def test_scales_reach_their_layer_and_half(model: PackedModel) -> None:
    spec = replace(model.spec, layers=3, kv_heads=5)
    scales = np.arange(30, dtype=np.float32)
    pool = make_pool(DeviceMemory(0, 0), spec, Strides(1, 1, 1), scales, torch.device("cpu"))
    for layer in range(3):
        for half, address in enumerate((pool.k_scale(layer), pool.v_scale(layer))):
            there = np.ctypeslib.as_array((ctypes.c_float * 5).from_address(address))
            np.testing.assert_array_equal(there, scales.reshape(3, 2, 5)[layer, half])
            assert address % 16 == 0


def test_deterministic_in_every_batch_chunk_and_restart(
    fixed: CudaRunner, model: PackedModel, platform: HostPlatform, pools: list[_Pool]
) -> None:
    """Logits and K/V of a sequence have the same bits whatever it is computed with, in which chunks and by whom."""
    tokens = text(model, LENGTH)
    seen = []
    for sizes, neighbours in (((LENGTH,), 0), ((1, 30, 33, 1, 24, 1), 2), ((64, 26), 1)):
        pool = _Pool(model, fixed)
        pools.append(pool)
        others = [pool.lane(text(model, 11 + i, i), 40) for i in range(neighbours)]
        lane = pool.lane(tokens, LENGTH)
        rows, start = [], 0
        for size in sizes:
            batch = [Chunk(other, 0, 3 + i, 0, True) for i, other in enumerate(others)]
            rows.append(fixed.logits([*batch, Chunk(lane, start, size, start, True)])[-size:])
            start += size
        pages = (lane.row & np.uint64(0xFFFF)).astype(int)
        values = pool.values[pages].view(np.uint16)
        used = LENGTH % PAGE_SIZE or PAGE_SIZE
        seen.append((np.concatenate(rows), values[:-1], values[-1][..., :used, :]))
        pool.release()
    for other in seen[1:]:
        for ours, theirs in zip(seen[0], other, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_deterministic_tokens_survive_a_restart(
    model: PackedModel, platform: HostPlatform, pools: list[_Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second runner takes over the pages after three tokens, with graphs where the first had none."""
    # Torch's products may hold still on this machine and not on the next: none may be asked for.
    monkeypatch.delattr(TorchProducts, "linear")
    whole = _runner(model, platform, (), deterministic=True)
    pool = _Pool(model, whole)
    pools.append(pool)
    prompt, asked = text(model, 21), SamplingParams(seed=77, temperature=0.9)
    lane = pool.lane(prompt, 40, asked)
    tokens = [int(whole.step([Chunk(lane, 0, 21, 0, True)]).tokens[0])]
    tokens += [int(whole.step([Chunk(lane, at, 1, at, True)]).tokens[0]) for at in range(21, 28)]
    successor = _runner(model, platform, (2,), deterministic=True)
    successor.map_pool(memoryview(pool.values.view(np.uint8)).cast("B"), PAGES, PAGE_SIZE)
    heir = Lane(lane.tokens.copy(), 21, 0, asked, lane.row)
    heir.tokens[21:24] = tokens[:3]
    successor.prepare(heir, 24)
    again = [int(successor.step([Chunk(heir, at, 1, at, True)]).tokens[0]) for at in range(23, 28)]
    assert again == tokens[3:]


def test_a_slot_is_given_back(eager: CudaRunner, model: PackedModel) -> None:
    pool = TestPool(model.spec, eager, "bfloat16", PAGES, PAGE_SIZE)
    for _ in range(5 * LIMITS.max_num_seqs):
        eager.release(pool.lane([1, 2], 2))
        pool.reset()


def test_the_pool_is_what_the_runner_leaves(model: PackedModel, platform: HostPlatform) -> None:
    runner = _runner(model, platform, (1,))
    free, total = platform.memory()
    assert runner.pool_bytes(0.75) == int(0.75 * total) - (total - free)
    assert runner.pool_bytes(0.25) == 0


def test_weights_that_travel_in_pieces_arrive_whole(
    model: PackedModel, platform: HostPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights.load_weights(model, "bfloat16", platform)
    monkeypatch.setattr(weights, "_CHUNK", 1000)
    pieces = weights.load_weights(model, "bfloat16", platform)
    for one, other in zip((whole, *whole.layers), (pieces, *pieces.layers), strict=True):
        for field in fields(one):
            tensor = getattr(one, field.name)
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(tensor, getattr(other, field.name)), field.name
