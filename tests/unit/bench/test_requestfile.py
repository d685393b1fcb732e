from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from peers_lib import requestfile
from peers_lib.requestfile import ORDINARY_TOKENS, Request, behind, draw, spread


def test_equal_arguments_draw_equal_requests() -> None:
    assert draw(7, 5, (4, 9), 3) == draw(7, 5, (4, 9), 3)
    assert draw(7, 5, (4, 9), 3) != draw(8, 5, (4, 9), 3)


def test_a_draw_keeps_its_limits() -> None:
    requests = draw(1, 200, (4, 9), 3, prefix="x")
    assert {len(request.prompt_token_ids) for request in requests} == set(range(4, 10))
    assert all(token in ORDINARY_TOKENS for request in requests for token in request.prompt_token_ids)
    assert [request.id for request in requests] == [f"x-{number}" for number in range(200)]
    assert all(request.max_tokens == 3 and request.ignore_eos for request in requests)


@pytest.mark.parametrize(("count", "lengths"), [(0, (1, 2)), (1, (0, 2)), (1, (3, 2))])
def test_a_draw_of_nothing_is_refused(count: int, lengths: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="one request or more"):
        draw(1, count, lengths, 3)


def test_a_common_prefix_is_in_front() -> None:
    requests = draw(3, 4, (2, 2), 1)
    for before, after in zip(requests, behind([7, 8, 9], requests), strict=True):
        assert after.prompt_token_ids == (7, 8, 9, *before.prompt_token_ids)


def test_arrivals_are_poisson() -> None:
    requests = spread(draw(3, 4001, (1, 1), 1), 5, rate=2.0)
    assert requests == spread(draw(3, 4001, (1, 1), 1), 5, rate=2.0)
    assert requests[0].at == 0.0
    gaps = [later.at - earlier.at for earlier, later in pairwise(requests)]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(0.5, rel=0.1)
    # Of an exponential distribution the deviation is the mean; of even gaps it would be nothing.
    assert statistics.stdev(gaps) == pytest.approx(0.5, rel=0.1)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    requests = spread(draw(3, 10, (1, 5), 2), 1, 3.0)
    path = tmp_path / "requests.jsonl"
    requestfile.write(path, requests)
    assert requestfile.read(path) == requests


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        '{"id": "a"}',
        '{"id": "a", "prompt_token_ids": [], "max_tokens": 1, "ignore_eos": true, "seed": 0}',
        '{"id": "a", "prompt_token_ids": [-1], "max_tokens": 1, "ignore_eos": true, "seed": 0}',
        '{"id": "a", "prompt_token_ids": [1], "max_tokens": 0, "ignore_eos": true, "seed": 0}',
        '{"id": "a", "prompt_token_ids": [1], "max_tokens": 1, "ignore_eos": true, "seed": 0, "more": 1}',
        '{"id": "a", "prompt_token_ids": [1], "max_tokens": 1, "ignore_eos": true, "seed": 0, "at": -0.5}',
        '{"id": "a", "prompt_token_ids": [1], "max_tokens": 1, "ignore_eos": true, "seed": 0, "at": Infinity}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "requests.jsonl"
    requestfile.write(path, draw(3, 1, (1, 5), 2))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"requests\.jsonl:2: not a request"):
        requestfile.read(path)


def test_ids_are_unique_and_files_not_empty(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    requestfile.write(path, [Request("a", (1,), 1, True, 0)] * 2)
    with pytest.raises(ValueError, match="same id"):
        requestfile.read(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no requests"):
        requestfile.read(path)
