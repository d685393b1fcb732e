"""Native sampling gives the reference's token, whatever the parameters."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.cpu.native import NativeModel, NativeSampling, SamplingFields
from kernels.cpu.packing import pack_linear
from kernels.reference import Sampling
from tests.kernels.variants import GROUPED, PLAIN, Pages, Sequence, Variant, as_chunks, random_tensors


def native_fields(params: Sampling, prompt_length: int) -> SamplingFields:
    return SamplingFields(
        seed=params.seed,
        temperature=params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        top_k=params.top_k,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        output_index=params.output_index,
        prompt_length=prompt_length,
        min_tokens=params.min_tokens,
        logprobs=True,
        bias=tuple(params.bias.items()),
        suppressed=tuple(params.suppressed),
    )


def check(model: NativeModel, logits: np.ndarray, params: Sampling, tokens: list[int], prompt_length: int) -> int:
    sampling = NativeSampling(native_fields(params, prompt_length))
    token, logprob = model.sample(logits, sampling, np.array(tokens, np.uint32))
    wanted = reference.sample(logits, params, tokens, prompt_length)
    assert token == wanted.token
    assert logprob == pytest.approx(wanted.logprob, rel=1e-5, abs=1e-5)
    return token


@st.composite
def logits_of(draw: st.DrawFn, vocab: int) -> np.ndarray:
    """Normal; or on a coarse grid, so that many are equal; or all equal; some of each with -inf among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "normal", "grid", "equal"]))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0, 50.0]))
    logits = {
        "normal": rng.normal(0, scale, vocab),
        "grid": np.round(rng.normal(0, 2, vocab)) / 2,
        "equal": np.full(vocab, scale),
    }[kind].astype(np.float32)
    if draw(st.integers(0, 5)) == 0:
        logits[rng.random(vocab) < 0.5] = -np.inf
        logits[rng.integers(vocab)] = 0
    return logits


@st.composite
def parameters(draw: st.DrawFn, vocab: int) -> Sampling:
    ids = st.integers(0, vocab + 3)  # also some that no token has
    off = st.booleans()

    def maybe(default: float, values: st.SearchStrategy[float]) -> float:
        return default if draw(off) else draw(values)

    return Sampling(
        seed=draw(st.integers(0, 2**64 - 1)),
        temperature=draw(st.sampled_from([0.0, 0.1, 0.7, 1.0, 1.0, 1.5, 10.0])),
        top_k=int(maybe(0, st.integers(1, vocab + 2))),
        top_p=maybe(1.0, st.floats(0.0, 1.0, width=32)),
        min_p=maybe(0.0, st.floats(0.0, 1.0, width=32)),
        repetition_penalty=maybe(1.0, st.floats(0.5, 2.0, width=32)),
        presence_penalty=maybe(0.0, st.floats(-2.0, 2.0, width=32)),
        frequency_penalty=maybe(0.0, st.floats(-2.0, 2.0, width=32)),
        output_index=draw(st.integers(0, 5)),
        bias=draw(st.dictionaries(ids, st.floats(-100.0, 100.0, width=32), max_size=4)),
        suppressed=draw(st.lists(ids, max_size=min(3, vocab - 1), unique=True)),
        min_tokens=draw(st.integers(0, 8)),
    )


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_the_token_is_the_reference_s(variant: Variant, data: st.DataObject) -> None:
    vocab = data.draw(st.one_of(st.integers(1, 9), st.integers(1, 400), st.just(3000)), "vocab")
    tokens = data.draw(st.lists(st.integers(0, min(vocab + 1, 30)), max_size=20), "tokens")
    prompt_length = data.draw(st.integers(0, len(tokens)), "prompt_length")
    model = variant.sampler(vocab)
    try:
        logits = data.draw(logits_of(vocab), "logits")
        check(model, logits, data.draw(parameters(vocab), "parameters"), tokens, prompt_length)
    finally:
        model.close()


@pytest.mark.parametrize(
    "params",
    [
        Sampling(),
        Sampling(temperature=0.2),
        Sampling(temperature=5.0),
        Sampling(top_p=0.95),
        Sampling(top_p=0.999999),
        Sampling(top_k=50, top_p=0.9, min_p=0.05),
        Sampling(top_k=40_000),
        Sampling(min_p=1e-4),
    ],
    ids=str,
)
def test_a_large_vocabulary(variant: Variant, params: Sampling) -> None:
    vocab = 49_152
    model = variant.sampler(vocab)
    try:
        for seed in range(4):
            rng = np.random.default_rng(seed)
            logits = rng.normal(0, 0.5 if seed == 0 else 3.0, vocab).astype(np.float32)
            check(model, logits, replace(params, seed=seed << 40), [1, 2, 3] * seed, seed)
    finally:
        model.close()


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@example(vocab=33, k=7)
@given(vocab=st.integers(2, 200), k=st.integers(1, 200))
def test_equal_logits_leave_the_lower_ids(variant: Variant, vocab: int, k: int) -> None:
    model = variant.sampler(vocab)
    try:
        logits = np.ones(vocab, np.float32)
        drawn = {check(model, logits, Sampling(seed=s, top_k=k), [0], 1) for s in range(8)}
        assert max(drawn) < k
        assert check(model, logits, Sampling(temperature=0.0), [0], 1) == 0
    finally:
        model.close()


def test_each_parameter_has_its_effect(variant: Variant) -> None:
    """So that no comparison above passes because a parameter is ignored on both sides."""
    model = variant.sampler(500)
    logits = np.random.default_rng(8).normal(0, 1, 500).astype(np.float32)
    tokens = np.argsort(-logits)[:60].tolist()
    try:
        plain = {s: check(model, logits, Sampling(seed=s), tokens, 30) for s in range(30)}
        for change in (
            {"temperature": 0.3},
            {"top_k": 3},
            {"top_p": 0.2},
            {"min_p": 0.5},
            {"repetition_penalty": 1.8},
            {"presence_penalty": 1.5},
            {"frequency_penalty": 1.5},
            {"output_index": 1},
            {"bias": {7: 9.0}},
            {"suppressed": tokens[:20], "min_tokens": 31},
        ):
            other = {s: check(model, logits, replace(Sampling(seed=s), **change), tokens, 30) for s in plain}
            assert other != plain, change
        allowed_again = replace(Sampling(), suppressed=tokens[:20], min_tokens=30)
        assert plain == {s: check(model, logits, replace(allowed_again, seed=s), tokens, 30) for s in plain}
    finally:
        model.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_mates_of_a_batch_do_not_matter(variant: Variant, threads: int) -> None:
    """Through a whole step: each gets the token that the reference draws from its own logits."""
    model = variant.model(GROUPED, random_tensors(GROUPED), "float32", threads)
    try:
        pages = Pages(model, GROUPED, "float32", 200, 16)
        rng = np.random.default_rng(4)
        wanted, chunks, sequences = [], [], []
        for i in range(24):
            tokens = rng.integers(0, GROUPED.vocab, 5 + i).astype(np.uint32)
            params = Sampling(
                seed=i,
                temperature=(0.0, 1.0, 0.5)[i % 3],
                top_k=(0, 20)[i % 2],
                top_p=(1.0, 0.8, 0.5, 1.0)[i % 4],
                min_p=(0.0, 0.05)[i // 2 % 2],
                repetition_penalty=(1.0, 1.3)[i // 3 % 2],
                presence_penalty=(0.0, 0.5)[i // 4 % 2],
                bias={i: 3.0},
            )
            sequence = Sequence(tokens, pages.row(len(tokens)), NativeSampling(native_fields(params, 4)))
            sequences.append(sequence)
            logits = model.logits(as_chunks([sequence.chunk(0, len(tokens))]))[-1]
            wanted.append(reference.sample(logits, params, tokens.tolist(), 4))
            chunks.append(sequence.chunk(0, len(tokens), sample=True))
        tokens, logprobs = np.zeros(24, np.uint32), np.zeros(24, np.float32)
        model.step(as_chunks(chunks), tokens, logprobs)
        assert tokens.tolist() == [sampled.token for sampled in wanted]
        np.testing.assert_allclose(logprobs, [sampled.logprob for sampled in wanted], rtol=1e-5, atol=1e-5)
    finally:
        model.close()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("repeated", [False, True])
def test_the_largest_logit_of_a_whole_step(variant: Variant, threads: int, rows: int, repeated: bool) -> None:
    """Where nothing else is asked for, logits are never all kept: the same token, and the lowest of equal ones."""
    tensors = random_tensors(GROUPED)
    if repeated:  # every logit is there several times, in each of the pieces that threads take
        head = np.random.default_rng(7).normal(0, 0.3, (10, GROUPED.hidden)).astype(ml_dtypes.bfloat16)
        tensors["output_head"] = pack_linear(np.resize(head, (GROUPED.vocab, GROUPED.hidden)))
    model = variant.model(GROUPED, tensors, "float32", threads)
    try:
        pages = Pages(model, GROUPED, "float32", 200, 16)
        rng = np.random.default_rng(5)
        plain = NativeSampling(replace(PLAIN, logprobs=False))
        wanted, chunks, sequences = [], [], []
        for i in range(rows):
            tokens = rng.integers(0, GROUPED.vocab, 5 + i).astype(np.uint32)
            sequence = Sequence(tokens, pages.row(len(tokens)), plain)
            sequences.append(sequence)  # which chunks point into
            logits = model.logits(as_chunks([sequence.chunk(0, len(tokens))]))[-1]
            wanted.append(int(np.argmax(logits)))
            chunks.append(sequence.chunk(0, len(tokens), sample=True))
        found = np.zeros(rows, np.uint32)
        model.step(as_chunks(chunks), found, np.zeros(rows, np.float32))
        assert found.tolist() == wanted
        assert not repeated or max(wanted) < 10
    finally:
        model.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": ((3, 100.0),)},
        {"repetition_penalty": 0.01},
        {"presence_penalty": -100.0},
        {"frequency_penalty": -100.0},
        {"min_tokens": 50, "suppressed": "largest"},
    ],
    ids=str,
)
def test_a_parameter_counts_without_logprobs(variant: Variant, fields: dict[str, object]) -> None:
    """One that moves a logit makes the token another one than that of the largest."""
    model = variant.model(GROUPED, random_tensors(GROUPED), "float32", 1)
    try:
        pages = Pages(model, GROUPED, "float32", 200, 16)
        tokens = np.arange(2, 9).astype(np.uint32)
        row = pages.row(len(tokens))
        sequence = Sequence(tokens, row, NativeSampling(PLAIN))
        largest = int(np.argmax(model.logits(as_chunks([sequence.chunk(0, len(tokens))]))[-1]))
        if "suppressed" in fields:
            fields = fields | {"suppressed": (largest,)}
        sampling = NativeSampling(replace(PLAIN, logprobs=False, **fields))  # type: ignore[arg-type]
        found = np.zeros(1, np.uint32)
        sequence = Sequence(tokens, row, sampling)
        model.step(as_chunks([sequence.chunk(0, len(tokens), sample=True)]), found, np.zeros(1, np.float32))
        assert found[0] != largest
    finally:
        model.close()


@pytest.mark.parametrize("cut", [{"top_p": 0.5}, {"top_k": 1, "top_p": 0.0}, {"min_p": 0.5}, {}])
def test_where_nothing_may_be_drawn_it_is_token_0(variant: Variant, cut: dict[str, float]) -> None:
    """Suppressed, or of no weight."""
    model = variant.sampler(2)
    try:
        params = Sampling(min_tokens=1, suppressed=[0], **cut)  # type: ignore[arg-type]
        assert check(model, np.array([0, -np.inf], np.float32), params, [], 0) == 0
    finally:
        model.close()


def test_no_logprob_unless_asked(variant: Variant) -> None:
    model = variant.sampler(10)
    try:
        sampling = NativeSampling(replace(PLAIN, logprobs=False))
        logits = np.arange(10, dtype=np.float32)
        assert model.sample(logits, sampling, np.zeros(1, np.uint32)) == (9, 0.0)
    finally:
        model.close()


@pytest.mark.parametrize(
    "params",
    [
        Sampling(),
        Sampling(temperature=0.0),
        Sampling(temperature=1e-45),
        Sampling(top_p=0.5),
        Sampling(top_k=3, min_p=0.5, repetition_penalty=1e-38),
        Sampling(bias={2: 3e38, 3: 3e38}),
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38, -3e38])
def test_a_token_of_the_vocabulary_whatever_the_logits(variant: Variant, params: Sampling, value: float) -> None:
    """A token that does not exist would be committed, and would take every successor down with it."""
    vocab = 70
    model = variant.sampler(vocab)
    try:
        for places in (slice(None), [2, 69], [0]):
            logits = np.linspace(-1, 1, vocab, dtype=np.float32)
            logits[places] = value
            sampling = NativeSampling(native_fields(params, 1))
            token, _ = model.sample(logits, sampling, np.array([2, 5], np.uint32))
            assert token < vocab
    finally:
        model.close()
