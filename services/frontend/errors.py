"""The one place where errors become gRPC statuses: a code, a sentence, and google.rpc details.

Nothing else reaches a client: an exception that nobody foresaw is logged under an id, and the
client gets INTERNAL with that id.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final, NoReturn

import grpc
import structlog
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from pagehold.executor.v1 import executor_pb2 as ex

log = structlog.get_logger()

DOMAIN: Final = "pagehold"


class RequestError(Exception):
    """Ends a call with a status. `message` is for the client: no paths, no exception texts."""

    def __init__(
        self, code: grpc.StatusCode, reason: str, message: str, field: str = "", retry_seconds: float = 0.0
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_seconds = retry_seconds

    def status(self) -> status_pb2.Status:
        details: list[Any] = [error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN)]
        if self.field:
            details[0].metadata["field"] = self.field
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_seconds:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromTimedelta(_timedelta(self.retry_seconds))
            details.append(retry)
        packed = []
        for detail in details:
            one = any_pb2.Any()
            one.Pack(detail)
            packed.append(one)
        return status_pb2.Status(code=code_pb2.Code.Value(self.code.name), message=self.message, details=packed)


def _timedelta(seconds: float) -> Any:
    from datetime import timedelta

    return timedelta(seconds=seconds)


def invalid(field: str, message: str) -> RequestError:
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", f"{field}: {message}", field)


def unavailable(message: str) -> RequestError:
    return RequestError(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", message, retry_seconds=0.5)


_FAILURES: dict[int, tuple[grpc.StatusCode, str, str, float]] = {
    ex.FAILURE_NOT_FOUND: (
        grpc.StatusCode.NOT_FOUND,
        "REQUEST_NOT_FOUND",
        "no such request: it was never accepted here, or it ended too long ago; send it again with Generate",
        0.0,
    ),
    ex.FAILURE_ALREADY_EXISTS: (
        grpc.StatusCode.ALREADY_EXISTS,
        "REQUEST_ID_IN_USE",
        "request_id is in use by a request with another body; choose another id",
        0.0,
    ),
    ex.FAILURE_OUT_OF_RANGE: (
        grpc.StatusCode.OUT_OF_RANGE,
        "OFFSET_OUT_OF_RANGE",
        "positions: an output or offset that does not exist yet; resume at the number of tokens you have",
        0.0,
    ),
    ex.FAILURE_TOO_LARGE: (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE", "the request can never fit", 0.0),
    ex.FAILURE_OVERLOADED: (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "the server is full; try later", 1.0),
    ex.FAILURE_TAKEN_OVER: (
        grpc.StatusCode.ABORTED,
        "TAKEN_OVER",
        "another stream has taken this request over",
        0.0,
    ),
    ex.FAILURE_DEADLINE: (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "DEADLINE_EXCEEDED",
        "the request's deadline ended it",
        0.0,
    ),
}


def from_failure(failed: ex.Failed) -> RequestError:
    """The executor's typed refusals; its detail is safe to show."""
    code, reason, message, retry = _FAILURES.get(
        failed.failure, (grpc.StatusCode.INTERNAL, "INTERNAL", "the request failed", 0.0)
    )
    return RequestError(code, reason, failed.detail or message, retry_seconds=retry)


class Unparsable:
    """Stands for a request whose bytes are no valid message, such as a string that is not UTF-8."""


class LenientParsing(grpc.aio.ServerInterceptor):
    """Bytes that do not parse become a clear INVALID_ARGUMENT instead of gRPC's INTERNAL."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None or handler.request_streaming:
            return handler
        parse = handler.request_deserializer

        def lenient(data: bytes) -> Any:
            try:
                return parse(data)
            except Exception:
                return Unparsable()

        return handler._replace(request_deserializer=lenient)


def _check(request: object) -> None:
    if isinstance(request, Unparsable):
        message = "the request is not a valid message; strings must be UTF-8"
        raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, "UNPARSABLE", message)


async def _abort(context: Any, error: BaseException) -> NoReturn:
    if not isinstance(error, RequestError):
        error_id = secrets.token_hex(6)
        log.error("unexpected error", error_id=error_id, exc_info=error)
        error = RequestError(grpc.StatusCode.INTERNAL, "INTERNAL", f"internal error {error_id}; see the server's log")
    await context.abort_with_status(rpc_status.to_status(error.status()))
    raise AssertionError("abort always raises")


def guarded(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """For unary methods."""

    @functools.wraps(method)
    async def call(self: object, request: Any, context: Any) -> Any:
        try:
            _check(request)
            return await method(self, request, context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await _abort(context, error)

    return call


def guarded_stream(method: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncIterator[Any]]:
    """For methods that answer with a stream."""

    @functools.wraps(method)
    async def call(self: object, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            _check(request)
            # Closed at once when the client is gone, not when the collector comes by.
            async with aclosing(method(self, request, context)) as responses:
                async for response in responses:
                    yield response
        except (asyncio.CancelledError, grpc.aio.AbortError, GeneratorExit):
            raise
        except Exception as error:
            await _abort(context, error)

    return call
