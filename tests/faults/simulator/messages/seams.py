"""Where the product touches the outside: for a schedule its clock, its channels and its failpoints are ours."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import grpc
import structlog

import pagehold.client
import pagehold.runtime.channel
import services.executor.sequence
import services.executor.server
import services.frontend.clientstream
import services.frontend.inference
import services.frontend.link
from kvmanager.layout import OutputLog, Reason, RequestLog
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.runtime import failpoint
from services.executor.publisher import Connection
from tests.faults.simulator.faults import Violation
from tests.faults.simulator.messages.calls import Channel
from tests.faults.simulator.messages.loop import VirtualTime
from tests.faults.simulator.messages.network import Network

Hit = Callable[[str], None]

_TIMED = (pagehold.client, services.frontend.clientstream, services.frontend.inference, services.frontend.link)


class DyingOutput(OutputLog):
    """Its words are stored by an executor that may die before."""

    __slots__ = ()

    def set_progress(self, computed: int, known: int) -> None:
        failpoint.hit("progress")
        super().set_progress(computed, known)

    def set_terminal(self, reason: Reason, length: int) -> None:
        failpoint.hit("terminal")
        super().set_terminal(reason, length)

    def set_cached_tokens(self, cached: int) -> None:
        failpoint.hit("cached tokens")
        super().set_cached_tokens(cached)


class DyingLog(RequestLog):
    """A log as its executor maps it."""

    def __init__(self, buffer: memoryview | bytearray) -> None:
        super().__init__(buffer)
        self.outputs = [
            DyingOutput(output.words, output.tokens, output.logprobs, output.prompt_length) for output in self.outputs
        ]


class CheckedConnection(Connection):
    """A frontend's stream as the executor has it: what goes out was committed before."""

    def offer(self, message: ex.ConnectResponse) -> None:
        run = message.tokens
        for stream_id, index, offset, count in zip(run.stream_ids, run.indexes, run.offsets, run.counts, strict=True):
            request = self.streams.get(stream_id)
            if request is not None:
                log = request.sequences[index].log
                if offset + count > log.known - log.prompt_length:
                    raise Violation(f"a token of output {index} of {request.key} is published before it is committed")
        super().offer(message)


@contextmanager
def seams(network: Network, hit: Hit) -> Iterator[None]:
    """hit(name): called at every failpoint, and before every store of an executor into a log."""

    def channel(address: str, options: Any = None) -> Channel:
        return Channel(network, address)

    async def listening(address: str) -> None:
        """A channel finds out by itself."""

    configured = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL)
    )  # deaths are no news here
    time = VirtualTime(network.loop)
    patches = [patch.object(module, "time", time) for module in _TIMED]
    patches.append(patch.object(grpc.aio, "insecure_channel", channel))
    patches.append(patch.object(pagehold.runtime.channel, "listening", listening))
    patches.append(patch.object(failpoint, "hit", hit))
    patches.append(patch.object(services.executor.sequence, "RequestLog", DyingLog))
    patches.append(patch.object(services.executor.server, "Connection", CheckedConnection))
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in reversed(patches):
            one.stop()
        structlog.configure(**configured)
