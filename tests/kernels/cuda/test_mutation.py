"""The tests on the stand-in find the bugs that kernels of this kind have: barriers, waits, tails, merges.

Not found, because there all see memory at once: a missing fence, and a missing warp barrier before a collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels.cuda.device import SOURCES
from tests.kernels.cuda.checks import CHECKS, Check, append, decode, decode_long, gemm, norm, sampled
from tests.kernels.cuda.mutation import Mutation, noticed, planted

CORE, LOADER, ROWS, MERGE = (f"attention{part}.cuh" for part in ("", "_loader", "_rows", "_merge"))
RANKING = "sampling_ranking.cuh"


def without(text: str, barrier: str = "sync_block();\n") -> tuple[str, str]:
    """The text, and the text without its barrier."""
    return text, text.replace(barrier, "\n", 1)


MUTATIONS = [
    Mutation("wait leaves a stage more", CORE, "cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()", append),
    Mutation(
        "a lone warp's wait leaves a stage more",
        CORE,
        "wait<STAGES - 1>();\n      S",
        "wait<STAGES>();\n      S",
        decode,
    ),
    Mutation(
        "no barrier before a stage is used",
        CORE,
        *without("S::synchronise();\n      if (tile + STAGES - 1", "S::synchronise();\n"),
        append,
    ),
    Mutation("no barrier after the queries", CORE, *without("head_first, queries);\n  sync_block();\n"), append),
    Mutation("no barrier before stages hold sums", CORE, *without("<0>();\n  sync_block();\n  float"), decode),
    Mutation("no barrier before sums are added", CORE, *without("warp_row);\n  sync_block();\n"), decode),
    Mutation("one key too many is loaded", LOADER, "(kv_end - kv_first)", "(kv_end - kv_first + 1)", decode),
    Mutation("page ids of the same tiles again", LOADER, "next_ids = page_ids(1)", "next_ids = ids", decode_long),
    Mutation("tail mask is off by one", ROWS, "minimum(item.kv_end - 1, at)", "minimum(item.kv_end, at + 1)", decode),
    Mutation("causal mask is off by one", ROWS, "|| key > upper[t][j / 2]", "|| key > upper[t][j / 2] + 1", append),
    Mutation("seen whole too early", ROWS, "S::kSlice - 1 <= full_last", "S::kSlice - 2 <= full_last", append),
    Mutation("no barrier before arrival", MERGE, *without("fence();\n  sync_block();\n  const"), decode),
    Mutation("no barrier after arrival", MERGE, *without("sync_block();\n  fence();\n"), decode),
    Mutation("merged one block too early", MERGE, "== arrivals - 1", "== arrivals - 2", decode),
    Mutation("counter is not reset", MERGE, "if (last[i]) *counter = 0;", "", decode),
    Mutation("an invisible part is weighted", MERGE, "top == kNothing ? 0.0f : ", "", append),
    Mutation("wait leaves a stage more", "gemm.cu", "_wait<T::STAGES - 2>()", "_wait<T::STAGES - 1>()", gemm),
    Mutation(
        "no barrier before a stage is used", "gemm.cu", *without("sync_block();  // the stage", "sync_block();"), gemm
    ),
    Mutation("a chunk too many", "gemm.cu", "column + chunk * CHUNK < k;", "column + chunk * CHUNK <= k;", gemm),
    Mutation("no barrier between the sums", "norm.cu", *without("sync_block();\n"), norm),
    Mutation("no barrier in reductions", RANKING, *without("room[warp_id()] = value;\n  sync_block();\n"), sampled),
    Mutation("ticket is not reset", "sampling.cu", "*own.ticket = 0;", "", sampled),
]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, host_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Mutation, Future[str | None]]]:
    """What becomes of the mutations of the tests that run: two at a time, for most of it is waiting for g++."""

    def outcome(mutation: Mutation) -> str | None:
        return noticed(mutation.check, planted(mutation, tmp_path_factory.mktemp("planted")), host_cache)

    parameters = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    wanted = [call.params["mutation"] for call in parameters if call is not None and "mutation" in call.params]
    with ThreadPoolExecutor(2) as pool:
        yield {mutation: pool.submit(outcome, mutation) for mutation in wanted}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_unchanged_sources_pass(host_cache: Path, check: Check) -> None:
    assert noticed(check, SOURCES, host_cache) is None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.name}")
def test_a_planted_bug_is_noticed(outcomes: dict[Mutation, Future[str | None]], mutation: Mutation) -> None:
    assert outcomes[mutation].result(), mutation.name


def test_a_mutation_that_no_longer_fits_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 times in norm"):
        planted(Mutation("gone", "norm.cu", "no such text", "", norm), tmp_path)
