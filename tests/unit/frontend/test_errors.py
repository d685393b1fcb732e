"""What a client sees of an error: a code, a sentence, typed details; never an exception or a path."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha import reflection

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from services.frontend.errors import ErrorGuard, RequestError, from_failure, invalid, unavailable


class Failing(api_grpc.InferenceServiceServicer):
    """Raises what the test wants."""

    def __init__(self) -> None:
        self.error: Exception = ValueError("secret in /etc/passwd")
        self.closed = asyncio.Event()

    async def Generate(self, request: api.GenerateRequest, context: Any) -> None:
        try:
            await context.write(api.GenerateResponse(accepted=api.Accepted()))
            if request.text == "flood":
                while True:
                    await context.write(api.GenerateResponse(tokens=api.Tokens(text="x" * 4096)))
            if request.text == "wait":
                await asyncio.sleep(60)
            raise self.error
        finally:
            self.closed.set()

    async def Cancel(self, request: api.CancelRequest, context: Any) -> api.CancelResponse:
        raise self.error


@pytest.fixture
async def failing() -> AsyncIterator[tuple[Failing, grpc.aio.Channel]]:
    servicer = Failing()
    server = grpc.aio.server(interceptors=[ErrorGuard()])
    api_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    reflection.enable_server_reflection((reflection.SERVICE_NAME,), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield servicer, channel
    await server.stop(0)


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The typed details, by the name of their message."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            assert status.code == error.code().value[0]
            assert status.message == error.details()
            kinds = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
            return {
                kind.__name__: packed.Unpack(message) and message
                for packed in status.details
                for kind in kinds
                if packed.Is((message := kind()).DESCRIPTOR)
            }
    raise AssertionError("no details")


async def generate(channel: grpc.aio.Channel, text: str = "a", timeout: float = 5) -> list[api.GenerateResponse]:
    call = api_grpc.InferenceServiceStub(channel).Generate(api.GenerateRequest(text=text), timeout=timeout)
    return [response async for response in call]


async def test_a_bad_field(failing: tuple[Failing, grpc.aio.Channel]) -> None:
    servicer, channel = failing
    servicer.error = invalid("sampling.top_p", "must be a number")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(channel)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    found = details(caught.value)
    assert (found["ErrorInfo"].reason, found["ErrorInfo"].domain) == ("INVALID_FIELD", "pagehold")
    assert found["ErrorInfo"].metadata["field"] == "sampling.top_p"
    assert found["BadRequest"].field_violations[0].field == "sampling.top_p"
    assert "RetryInfo" not in found


async def test_a_hint_when_to_try_again(failing: tuple[Failing, grpc.aio.Channel]) -> None:
    servicer, channel = failing
    servicer.error = unavailable("no executor is ready yet")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await api_grpc.InferenceServiceStub(channel).Cancel(api.CancelRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details(caught.value)["RetryInfo"].retry_delay.ToMilliseconds() == 500


async def test_what_nobody_foresaw_shows_an_id_only(
    failing: tuple[Failing, grpc.aio.Channel], capfd: pytest.CaptureFixture[str]
) -> None:
    _, channel = failing
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        await generate(channel)
    with pytest.raises(grpc.aio.AioRpcError) as unary:
        await api_grpc.InferenceServiceStub(channel).Cancel(api.CancelRequest())
    logged = "".join(capfd.readouterr())
    for caught in (streamed, unary):
        message = caught.value.details() or ""
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in message and "passwd" not in message and "ValueError" not in message
        assert message.split()[2].rstrip(";") in logged, "the id is in the log"
    assert "secret in /etc/passwd" in logged


@pytest.mark.parametrize(("method", "data"), [("Generate", b"\x1a\x02\xff\xfe"), ("Cancel", b"\x0a\x02\xff\xfe")])
async def test_bytes_that_are_no_message(failing: tuple[Failing, grpc.aio.Channel], method: str, data: bytes) -> None:
    _, channel = failing
    path = f"/pagehold.v1.InferenceService/{method}"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (channel.unary_stream(path)(data).read() if method == "Generate" else channel.unary_unary(path)(data))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in (caught.value.details() or "")
    assert details(caught.value)["ErrorInfo"].reason == "UNPARSABLE"


async def test_bytes_that_are_no_message_for_reflection(failing: tuple[Failing, grpc.aio.Channel]) -> None:
    _, channel = failing
    call = channel.stream_stream(f"/{reflection.SERVICE_NAME}/ServerReflectionInfo")(iter([b"\x0a\x02\xff\xfe"]))
    answers = [answer async for answer in call]
    assert len(answers) == 1 and b"Error" not in answers[0]


@pytest.mark.parametrize("text", ["wait", "flood"])
async def test_a_client_that_goes_away_is_noticed_at_once(failing: tuple[Failing, grpc.aio.Channel], text: str) -> None:
    """Whether the method waits for something or is stuck in a write."""
    servicer, channel = failing
    call = api_grpc.InferenceServiceStub(channel).Generate(api.GenerateRequest(text=text))
    await call.read()
    await asyncio.sleep(0.3)
    assert not servicer.closed.is_set()
    call.cancel()
    await asyncio.wait_for(servicer.closed.wait(), 1)


async def test_a_deadline_ends_a_method_that_waits(failing: tuple[Failing, grpc.aio.Channel]) -> None:
    servicer, channel = failing
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(channel, "wait", timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(servicer.closed.wait(), 1)


@pytest.mark.parametrize("failure", [value for value in ex.Failure.values() if value])
def test_every_refusal_of_the_executor_has_a_status(failure: ex.Failure) -> None:
    error = from_failure(ex.Failed(failure=failure))
    assert error.code is not grpc.StatusCode.INTERNAL
    assert error.message
    assert error.status().details
    assert from_failure(ex.Failed(failure=failure, detail="because")).message == "because"


def test_a_prefix_cannot_be_reserved_where_none_is_cached() -> None:
    error = from_failure(ex.Failed(failure=ex.FAILURE_NO_PREFIX_CACHE))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "the prefix cache is off" in error.message


def test_an_error_is_an_exception_with_its_message() -> None:
    assert str(RequestError(grpc.StatusCode.ABORTED, "WHY", "the message")) == "the message"
