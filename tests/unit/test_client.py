"""Requests from plain values, and what a reader makes of repeated events."""

from __future__ import annotations

import grpc
import pytest

from pagehold.client import _Reading, make_request
from pagehold.v1 import inference_pb2 as api


def test_options_go_to_their_messages() -> None:
    request = make_request(
        [{"role": "user", "content": "hi"}], temperature=0.0, stop=["x"], max_tokens=3, n=2, logprobs=True,
        logit_bias={7: 1.5}, seed=None,
    )  # fmt: skip
    assert request.chat.messages[0].content == "hi"
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("seed")
    assert list(request.stopping.stop) == ["x"]
    assert (request.stopping.max_tokens, request.n, request.response.logprobs) == (3, 2, True)
    assert request.sampling.logit_bias[7] == 1.5
    assert request.response.detach_grace.seconds == 30


def test_every_field_of_a_request_is_an_option() -> None:
    request = make_request("text", n=2, best_of=4, priority=-3, pin_prefix="system", cache_salt="s", request_id="r")
    assert (request.n, request.best_of, request.priority) == (2, 4, -3)
    assert (request.pin_prefix, request.cache_salt, request.request_id) == ("system", "s", "r")


def test_prompts_of_each_kind() -> None:
    assert make_request("text").text == "text"
    assert list(make_request([1, 2]).token_ids.ids) == [1, 2]
    assert make_request([]).WhichOneof("prompt") == "token_ids"


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="temprature"):
        make_request("text", temprature=1)


def test_events_repeated_by_resume_come_once() -> None:
    reading = _Reading()
    accepted = api.GenerateResponse(accepted=api.Accepted(request_id="r"))
    tokens = api.GenerateResponse(tokens=api.Tokens(index=1, offset=4, token_ids=[5, 6]))
    finished = api.GenerateResponse(finished=api.Finished(index=1))
    assert [reading.take(one) for one in (accepted, tokens, finished)] == [True, True, True]
    assert [reading.take(one) for one in (accepted, finished)] == [False, False]
    assert reading.offsets == {1: 6}


def broken(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


def test_a_stream_that_broke_may_take_its_own_successor_over_once() -> None:
    reading = _Reading()
    aborted, unavailable = broken(grpc.StatusCode.ABORTED), broken(grpc.StatusCode.UNAVAILABLE)
    assert not reading.may_retry(aborted, 30.0)  # somebody else's
    assert reading.may_retry(unavailable, 30.0)
    assert reading.may_retry(aborted, 30.0)
    assert not reading.may_retry(aborted, 30.0)


@pytest.mark.parametrize("accepted", [False, True])
def test_a_call_that_met_the_end_of_its_server_is_made_again(accepted: bool) -> None:
    reading = _Reading()
    if accepted:
        reading.take(api.GenerateResponse(accepted=api.Accepted(request_id="r")))
    assert reading.may_retry(broken(grpc.StatusCode.CANCELLED), 30.0)
    assert not reading.may_retry(broken(grpc.StatusCode.INTERNAL), 30.0)
