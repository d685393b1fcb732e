"""The checker itself: whatever a stream can do wrong is told apart."""

from __future__ import annotations

import pytest

from pagehold.v1 import inference_pb2 as api
from services.torture.history import History, Kind, Output

REFERENCE = [Output([5, 6, 7], [-1.0, -2.0, -3.0], "a b c", api.FINISH_REASON_LENGTH, 4, 3)]


def accepted() -> api.GenerateResponse:
    return api.GenerateResponse(accepted=api.Accepted(request_id="r", prompt_tokens=4))


def tokens(offset: int, ids: list[int], text: str, logprobs: list[float] | None = None) -> api.GenerateResponse:
    found = [-float(at + 1) for at in range(offset, offset + len(ids))] if logprobs is None else logprobs
    return api.GenerateResponse(tokens=api.Tokens(offset=offset, token_ids=ids, text=text, logprobs=found))


def finished(reason: int = api.FINISH_REASON_LENGTH, completion: int = 3, prompt: int = 4) -> api.GenerateResponse:
    usage = api.Usage(prompt_tokens=prompt, completion_tokens=completion)
    return api.GenerateResponse(finished=api.Finished(reason=reason, usage=usage))  # type: ignore[arg-type]


def heard(*events: api.GenerateResponse, may_be_cut: bool = False) -> list[Kind]:
    history = History("r", 1, REFERENCE)
    history.may_be_cut = may_be_cut
    for event in events:
        history.take(event)
    history.end_stream()
    return [one.kind for one in history.deviations]


def test_what_equals_the_reference_is_right() -> None:
    assert heard(accepted(), tokens(0, [5], "a"), tokens(1, [6, 7], " b c"), finished()) == []


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([tokens(0, [5, 6], "a b"), tokens(1, [6, 7], " b c"), finished()], Kind.REPEATED),
        ([tokens(0, [5], "a"), tokens(2, [7], " c"), finished()], Kind.LOST),
        ([tokens(0, [5, 6], "a b"), finished(completion=3)], Kind.LOST),
        ([tokens(0, [5, 6], "a b"), finished(completion=2)], Kind.LOST),
        ([tokens(0, [5, 6, 7], "a b c")], Kind.LOST),
        ([tokens(0, [5, 9, 7], "a b c"), finished()], Kind.WRONG),
        ([tokens(0, [5, 6, 7], "a B c"), finished()], Kind.WRONG),
        ([tokens(0, [5, 6, 7], "a b"), finished()], Kind.WRONG),
        ([tokens(0, [5, 6, 7], "a b c", [-1.0, -2.5, -3.0]), finished()], Kind.WRONG),
        ([tokens(0, [5, 6, 7], "a b c", []), finished()], Kind.WRONG),
        ([tokens(0, [5, 6, 7, 8], "a b c d"), finished(completion=4)], Kind.WRONG),
        ([tokens(0, [5, 6, 7], "a b c"), finished(reason=api.FINISH_REASON_STOP)], Kind.WRONG),
        ([tokens(0, [5, 6, 7], "a b c"), finished(prompt=5)], Kind.WRONG),
        ([tokens(0, [5, 6, 7], "a b c"), finished(), tokens(3, [8], "d")], Kind.REPEATED),
        ([tokens(0, [5, 6, 7], "a b c"), finished(), finished()], Kind.REPEATED),
        ([tokens(0, [5, 6], "a b"), finished(api.FINISH_REASON_CANCELLED, 2)], Kind.WRONG),
    ],
)
def test_every_deviation_has_its_kind(events: list[api.GenerateResponse], kind: Kind) -> None:
    assert kind in heard(*events)


def test_a_cancelled_request_is_a_prefix() -> None:
    cut = finished(api.FINISH_REASON_CANCELLED, 2)
    assert heard(tokens(0, [5, 6], "a b"), cut, may_be_cut=True) == []
    assert heard(tokens(0, [5, 6], "a b\N{REPLACEMENT CHARACTER}"), cut, may_be_cut=True) == []
    assert heard(tokens(0, [5, 8], "a b"), cut, may_be_cut=True) == [Kind.WRONG]


def test_an_end_comes_again_with_a_new_stream_and_must_be_the_same() -> None:
    history = History("r", 1, REFERENCE)
    for event in (tokens(0, [5, 6, 7], "a b c"), finished()):
        history.take(event)
    history.begin_stream()
    history.take(finished())
    history.end_stream()
    assert history.deviations == []
    history.begin_stream()
    history.take(finished(reason=api.FINISH_REASON_STOP))
    assert [one.kind for one in history.deviations] == [Kind.WRONG, Kind.WRONG]
