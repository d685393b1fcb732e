"""The one place where errors become gRPC statuses: a code, a sentence, and google.rpc details.

Nothing else reaches a client: an exception that nobody foresaw is logged under an id, and the
client gets INTERNAL with that id.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Final, NoReturn

import grpc
import structlog
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.runtime.failpoint import FailpointError

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
            retry.retry_delay.FromTimedelta(timedelta(seconds=self.retry_seconds))
            details.append(retry)
        packed = []
        for detail in details:
            one = any_pb2.Any()
            one.Pack(detail)
            packed.append(one)
        return status_pb2.Status(code=code_pb2.Code.Value(self.code.name), message=self.message, details=packed)


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
    ex.FAILURE_NO_PREFIX_CACHE: (
        grpc.StatusCode.FAILED_PRECONDITION,
        "NO_PREFIX_CACHE",
        "pin_prefix: the prefix cache is off; leave the field out, or start the server with --prefix-cache",
        0.0,
    ),
}


def from_failure(failed: ex.Failed) -> RequestError:
    """The executor's typed refusals; its detail is safe to show."""
    code, reason, message, retry = _FAILURES.get(
        failed.failure, (grpc.StatusCode.INTERNAL, "INTERNAL", "the request failed", 0.0)
    )
    return RequestError(code, reason, failed.detail or message, retry_seconds=retry)


class _Unparsable:
    """Stands for a request whose bytes are no valid message, such as a string that is not UTF-8."""


class ErrorGuard(grpc.aio.ServerInterceptor):
    """Around every method with one request: what it raises, and bytes that do not parse, become statuses.

    Methods that stream must write to their context. A generator would be left hanging at its `yield`
    when the client goes away; a method that writes gets the exception there, and its `finally` runs at once.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        parse = handler.request_deserializer
        if handler.request_streaming:
            # Only reflection, which has an answer of its own to an empty message.
            return handler._replace(request_deserializer=_lenient(parse, parse(b"")))
        kind = "unary_stream" if handler.response_streaming else "unary_unary"
        guarded = {kind: _guard(getattr(handler, kind)), "request_deserializer": _lenient(parse, _Unparsable())}
        return handler._replace(**guarded)


def _lenient(parse: Callable[[bytes], Any], otherwise: object) -> Callable[[bytes], Any]:
    def lenient(data: bytes) -> Any:
        try:
            return parse(data)
        except Exception:
            return otherwise

    return lenient


def _guard(method: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: Any) -> Any:
        try:
            if isinstance(request, _Unparsable):
                message = "the request is not a valid message; strings must be UTF-8"
                raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, "UNPARSABLE", message)
            return await method(request, context)
        except grpc.aio.BaseError:
            raise  # the call is over already: aborted, or the client is gone
        except Exception as error:
            await _abort(context, error)

    return call


async def _abort(context: Any, error: Exception) -> NoReturn:
    if isinstance(error, FailpointError):
        log.error("a stream fails", reason=str(error))
        error = unavailable("a fault was put here; Resume at the number of tokens received")
    if not isinstance(error, RequestError):
        error_id = secrets.token_hex(6)
        log.error("unexpected error", error_id=error_id, exc_info=error)
        error = RequestError(grpc.StatusCode.INTERNAL, "INTERNAL", f"internal error {error_id}; see the server's log")
    await context.abort_with_status(rpc_status.to_status(error.status()))
    raise AssertionError("abort always raises")
