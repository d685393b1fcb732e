"""Sampling on CUDA gives the reference's token, whatever the parameters, the other rows and the order of threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.cpu.native import NativeSampling, available_isas
from kernels.cuda.sampling import SAMPLING, WANT_LOGPROB, Geometry, LogitsDtype, Sampler
from kernels.reference import Sampling
from tests.kernels.cuda.host import HostDevice
from tests.kernels.test_sampling import logits_of, native_fields, parameters
from tests.kernels.variants import Variant

# Several ranges and a short list already with a small vocabulary.
SMALL = Geometry(threads=64, range_tokens=500, listed=64)

NUMPY: dict[LogitsDtype, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclass(frozen=True)
class Row:
    logits: np.ndarray
    params: Sampling
    tokens: Sequence[int] = ()
    prompt_length: int = 0
    logprob: bool = True


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def launch(sampler: Sampler, rows: Sequence[Row], dtype: LogitsDtype = "float32") -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of one launch, in which rows have lanes in reverse and padding between them."""
    vocab, count = len(rows[0].logits), len(rows)
    padded, stride = 2 * count, vocab + 5
    logits = np.full((padded, stride), 6e4, NUMPY[dtype])
    samples = np.zeros((padded, 4), np.int32)
    samples[:, :2] = 1 << 30  # of a lane that is not there
    lanes = np.zeros(count, SAMPLING)
    longest = max(len(row.tokens) for row in rows)
    history = np.full((count, longest + 2), -1, np.int32)
    bias_ids, bias_values, suppressed = [], [], []
    for i, row in enumerate(rows):
        lane = count - 1 - i
        logits[2 * i, :vocab] = row.logits
        samples[2 * i] = (lane, len(row.tokens), 1, 0)
        history[lane, : len(row.tokens)] = row.tokens
        params = row.params
        lanes[lane] = (
            *(params.seed, params.temperature, params.top_p, params.min_p, params.top_k),
            *(params.repetition_penalty, params.presence_penalty, params.frequency_penalty),
            *(params.output_index, row.prompt_length, params.min_tokens),
            *(len(bias_ids), len(params.bias), len(suppressed), len(params.suppressed)),
            *(WANT_LOGPROB if row.logprob else 0, 0),
        )
        bias_ids += params.bias.keys()
        bias_values += params.bias.values()
        suppressed += params.suppressed
    shared = [np.array([*ids, 0], np.uint32) for ids in (bias_ids, suppressed)]
    values = np.array([*bias_values, 0.0], np.float32)
    # Only the first word of a row is asked to be zero.
    scratch = np.full((padded, sampler.scratch_bytes(1) // 4), 0x7FC00123, np.uint32)
    scratch[:, 0] = 0
    before = history.copy()
    tokens, logprobs = np.full(padded, -7, np.int32), np.full(padded, -7, np.float32)
    sampler.launch(
        logits=address(logits),
        row_stride=stride,
        samples=address(samples),
        params=address(lanes),
        bias_ids=address(shared[0]),
        bias_values=address(values),
        suppressed_ids=address(shared[1]),
        history=address(history),
        history_stride=history.shape[1],
        scratch=address(scratch),
        tokens_out=address(tokens),
        logprobs_out=address(logprobs),
        rows=padded,
    )
    assert (scratch[:, 0] == 0).all()
    assert (tokens[1::2] == -7).all() and (logprobs[1::2] == -7).all()
    for i, row in enumerate(rows):
        before[count - 1 - i, len(row.tokens)] = tokens[2 * i]
    np.testing.assert_array_equal(history, before)
    return tokens[::2].tolist(), logprobs[::2].tolist()


def check(sampler: Sampler, rows: Sequence[Row], dtype: LogitsDtype = "float32") -> list[int]:
    tokens, logprobs = launch(sampler, rows, dtype)
    wanted = [reference.sample(row.logits, row.params, row.tokens, row.prompt_length) for row in rows]
    assert tokens == [sampled.token for sampled in wanted]
    np.testing.assert_allclose(logprobs, [sampled.logprob for sampled in wanted], rtol=1e-5, atol=1e-5)
    return tokens


@st.composite
def row_of(draw: st.DrawFn, vocab: int) -> Row:
    tokens = draw(st.lists(st.integers(0, min(vocab + 1, 30)), max_size=20))
    return Row(draw(logits_of(vocab)), draw(parameters(vocab)), tokens, draw(st.integers(0, len(tokens))))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_the_token_is_the_reference_s(host: HostDevice, data: st.DataObject) -> None:
    vocab = data.draw(st.one_of(st.integers(1, 9), st.integers(1, 1200), st.just(3000)), "vocab")
    check(Sampler(host, vocab, "float32", SMALL), data.draw(st.lists(row_of(vocab), min_size=1, max_size=3), "rows"))


FILTERS = [
    Sampling(),
    Sampling(temperature=0.0),
    Sampling(temperature=0.2),
    Sampling(temperature=5.0),
    Sampling(top_p=0.95),
    Sampling(top_p=0.999999),
    Sampling(top_p=0.0),
    Sampling(top_k=1),
    Sampling(top_k=50, top_p=0.9, min_p=0.05),
    Sampling(top_k=2900),
    Sampling(top_k=2900, top_p=0.97),
    Sampling(min_p=1e-4),
    Sampling(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2),
    Sampling(top_p=0.9, bias={5: 3.0, 2999: 4.0}, suppressed=[1, 2, 700], min_tokens=9),
]


def rows_of(filters: Sequence[Sampling], vocab: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for i, params in enumerate(filters):
        logits = rng.normal(0, (0.02, 1.0, 3.0)[(i + seed) % 3], vocab).astype(np.float32)
        rows.append(Row(logits, replace(params, seed=seed << 40 | i), rng.integers(0, vocab, 7 * i).tolist(), 3 * i))
    return rows


@pytest.mark.parametrize("schedule", ["forward", "reverse", "random:3"])
def test_changes_decide_among_few_tokens(host_cache: Path, schedule: str) -> None:
    """Logits so close that whatever penalties, bias and suppression do to each token shows."""
    rng = np.random.default_rng(9)
    vocab, rows = 70, []
    for seed in range(60):
        tokens = rng.integers(0, vocab, 60).tolist()
        params = Sampling(
            temperature=(0.0, 0.05)[seed % 2],
            repetition_penalty=(1.0, 1.4, 0.7)[seed % 3],
            presence_penalty=(0.0, 0.4, -0.4, 0.4)[seed % 4],
            frequency_penalty=(0.0, 0.2, -0.2)[seed // 2 % 3],
            bias={int(v): 0.5 for v in rng.integers(0, vocab, seed % 5)},
            suppressed=rng.integers(0, vocab, 20).tolist(),
            min_tokens=29 + seed // 6 % 3,
        )
        rows.append(Row(rng.normal(0.5, 0.3, vocab).astype(np.float32), params, tokens, 30))
    check(Sampler(HostDevice(host_cache, schedule=schedule), vocab, "float32", SMALL), rows)


def test_borders(host: HostDevice) -> None:
    """The output starts right behind the prompt; min-p keeps a weight just above it, and none just below."""
    few = Sampler(host, 4, "float32", SMALL)
    greedy = Sampling(temperature=0.0, presence_penalty=5.0)
    logits = np.array([1.0, 0.9, 0.8, 0.7], np.float32)
    assert check(few, [Row(logits, greedy, [3, 0], 1), Row(logits, greedy, [3, 0], 2)]) == [1, 0]
    for z, drawn in ((-0.69, {0, 1}), (-0.696, {0})):
        two = np.array([0.0, z, -np.inf, -np.inf], np.float32)
        assert set(check(few, [Row(two, Sampling(seed=seed, min_p=0.5)) for seed in range(20)])) == drawn


def test_as_it_is_launched_on_a_device(host: HostDevice) -> None:
    """A thousand threads, all in one range."""
    sampler = Sampler(host, 3000, "float32")
    for seed in range(2):
        check(sampler, rows_of(FILTERS, 3000, seed))


@pytest.mark.parametrize("schedule", ["reverse", "random:1", "random:2"])
def test_the_order_of_threads_and_blocks_does_not_matter(host_cache: Path, schedule: str) -> None:
    sampler = Sampler(HostDevice(host_cache, schedule=schedule), 3000, "float32", SMALL)
    rows = rows_of(FILTERS, 3000, 5)
    check(sampler, rows)
    grid = [replace(row, logits=np.round(row.logits)) for row in rows]
    check(sampler, grid)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_16_bits(host: HostDevice, dtype: LogitsDtype) -> None:
    rows = rows_of(FILTERS, 700, 3)
    rounded = [replace(row, logits=row.logits.astype(NUMPY[dtype]).astype(np.float32)) for row in rows]
    check(Sampler(host, 700, dtype, SMALL), rounded, dtype)


def test_the_other_rows_do_not_matter(host: HostDevice) -> None:
    sampler = Sampler(host, 3000, "float32", SMALL)
    rows = rows_of(FILTERS, 3000, 6)
    together = launch(sampler, rows)
    alone = [launch(sampler, [row]) for row in rows]
    assert together == ([tokens[0] for tokens, _ in alone], [logprobs[0] for _, logprobs in alone])


def test_equal_logits_leave_the_lower_ids(host: HostDevice) -> None:
    vocab = 1500
    sampler = Sampler(host, vocab, "float32", SMALL)
    ones = np.ones(vocab, np.float32)
    for cut in (Sampling(top_k=7), Sampling(top_k=800), Sampling(top_p=0.5), Sampling(top_k=1000, top_p=0.25)):
        check(sampler, [Row(ones, replace(cut, seed=seed)) for seed in range(6)])
    # The part ends with the last of the best, among others as good that are in the list.
    few = Sampler(host, 50, "float32", SMALL)
    check(few, [Row(ones[:50], Sampling(seed=seed, top_k=1, top_p=0.5)) for seed in range(6)])


def test_the_largest_noise_lifts_a_token_that_lies_far_below(host: HostDevice) -> None:
    """Nothing is passed over that could win: this seed gives token 1 the largest noise there is, 17.25 more than 0."""
    sampler = Sampler(host, 2, "float32", SMALL)
    params = Sampling(seed=7_935_899)
    rows = [
        Row(np.array([0, z], np.float32), cut) for z in (-17.24, -17.25) for cut in (params, replace(params, top_k=2))
    ]
    assert check(sampler, rows) == [1, 1, 0, 0]


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1, 0x0123456789ABCDEF])
def test_noise_bit_for_bit(host: HostDevice, seed: int) -> None:
    count, first = 600, 131_000
    for position, index in ((0, 0), (7, 3), (2**32 - 1, 2**32 - 1)):
        words, values = np.zeros(count, np.uint32), np.zeros(count, np.float32)
        sampler = Sampler(host, 9, "float32", SMALL)
        sampler.noise(seed, position, index, first, count, address(words), address(values))
        tokens = np.arange(first, first + count)
        key = (seed & 0xFFFFFFFF, seed >> 32)
        np.testing.assert_array_equal(words, reference.philox4x32((position, index, tokens, 0), key)[0])
        np.testing.assert_array_equal(values, reference.gumbel(seed, position, index, tokens))


def test_no_logprob_unless_asked(host: HostDevice) -> None:
    sampler = Sampler(host, 10, "float32", SMALL)
    row = Row(np.arange(10, dtype=np.float32), Sampling(temperature=0.0), logprob=False)
    assert launch(sampler, [row]) == ([9], [0.0])


EXTREMES = [
    Sampling(),
    Sampling(temperature=0.0),
    Sampling(temperature=1.2e-38),  # about the least that is not subnormal; a GPU takes those for 0
    Sampling(top_p=0.5),
    Sampling(top_k=3, min_p=0.5, repetition_penalty=1e-38),
    Sampling(bias={2: 3e38, 3: 3e38}),
]


@pytest.mark.parametrize("value", [np.inf, -np.inf, 3e38, -3e38])
def test_the_cpu_s_token_whatever_the_logits(host: HostDevice, value: float) -> None:
    vocab = 570
    sampler = Sampler(host, vocab, "float32", SMALL)
    native = Variant(available_isas()[0], None).sampler(vocab)
    try:
        rows = []
        for places in (slice(None), [2, 569], [0]):
            logits = np.linspace(-1, 1, vocab, dtype=np.float32)
            logits[places] = value
            rows += [Row(logits, params, (2, 5), 1) for params in EXTREMES]
        tokens, _ = launch(sampler, rows)
        wanted = [
            native.sample(row.logits, NativeSampling(native_fields(row.params, 1)), np.array(row.tokens, np.uint32))[0]
            for row in rows
        ]
        assert tokens == wanted
    finally:
        native.close()


def test_nan_is_never_drawn(host: HostDevice) -> None:
    vocab = 570
    logits = np.where(np.arange(vocab) % 3 == 1, np.linspace(-1, 1, vocab), np.nan).astype(np.float32)
    sampler = Sampler(host, vocab, "float32", SMALL)
    rows = [Row(logits, replace(params, seed=seed), (2, 5), 1) for params in EXTREMES for seed in range(4)]
    tokens, logprobs = launch(sampler, rows)
    assert all(token % 3 == 1 for token in tokens)
    assert np.isfinite(logprobs).all()
    assert launch(sampler, [Row(np.full(vocab, np.nan, np.float32), Sampling())])[0] == [0]


@pytest.mark.parametrize("vocab", [0, 2**19 + 1])
def test_a_vocabulary_that_does_not_fit_is_refused(host: HostDevice, vocab: int) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        Sampler(host, vocab, "float32")
