"""The frontend before an executor that comes and goes: what is said again, and what only once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.runtime.protocol import PROTOCOL
from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from services.frontend import clientstream
from services.frontend.clientstream import ClientStream
from services.frontend.errors import ErrorGuard
from services.frontend.inference import InferenceServicer
from services.frontend.link import ExecutorLink
from services.frontend.tally import Tally
from tests.unit.frontend.world import FakeExecutor, described, step


class Frontend:
    """The servicer over a link, on a port of its own, in this process."""

    def __init__(self, executor: FakeExecutor) -> None:
        self.executor = executor
        self.changes = 0
        self.link = ExecutorLink(executor.address, self._changed)
        self.tally = Tally()
        self.servicer = InferenceServicer(self.link, max_streams=8, max_stream_buffer=64, tally=self.tally)
        self.stub: Any = None

    def _changed(self) -> None:
        self.changes += 1

    async def until(self, connected: bool) -> None:
        async with asyncio.timeout(5):
            while self.link.connected is not connected:
                await asyncio.sleep(0.005)

    async def restart_executor(self) -> None:
        await self.executor.stop()
        await self.until(False)
        await self.executor.start()
        await self.until(True)

    def generate(self, request_id: str = "one", timeout: float | None = None, **fields: Any) -> Any:
        return self.stub.Generate(api.GenerateRequest(request_id=request_id, text="ab", **fields), timeout=timeout)


@pytest.fixture
async def frontend(tmp_path: Path) -> AsyncIterator[Frontend]:
    executor = FakeExecutor(tmp_path)
    await executor.start()
    frontend = Frontend(executor)
    server = grpc.aio.server(interceptors=[ErrorGuard()])
    api_grpc.add_InferenceServiceServicer_to_server(frontend.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    linking = asyncio.create_task(frontend.link.run())
    await frontend.until(True)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        frontend.stub = api_grpc.InferenceServiceStub(channel)
        yield frontend
    await server.stop(0)
    linking.cancel()
    await executor.stop()


async def event(call: Any, kind: str) -> Any:
    response = await asyncio.wait_for(call.read(), 5)
    assert response is not grpc.aio.EOF, "the stream ended"
    assert response.WhichOneof("event") == kind, response
    return getattr(response, kind)


async def status(call: Any) -> grpc.aio.AioRpcError:
    """The error that the stream ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(_read(call), 5)
    return caught.value


async def _read(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def quiet(executor: FakeExecutor, seconds: float = 0.1) -> None:
    await asyncio.sleep(seconds)
    assert executor.heard.empty(), executor.heard.get_nowait()


# --- a stream across restarts ---


async def test_a_stream_goes_on_where_it_was(frontend: Frontend) -> None:
    executor = frontend.executor
    call = frontend.generate()
    submit = await executor.accept()
    assert submit.prompt == frontend.link.served().tokenizer.encode("ab")
    assert (await event(call, "accepted")).request_id == "one"
    executor.say(tokens=step(submit.stream_id, 0, [5, 6]))
    assert (await event(call, "tokens")).token_ids == [5, 6]

    await frontend.restart_executor()
    attach = await executor.hear("attach")
    assert (attach.request_id, attach.describe) == ("one", False)
    assert [(one.index, one.offset) for one in attach.positions] == [(0, 2)]
    assert (await event(call, "notice")).kind == api.NOTICE_KIND_RECOVERED
    # The new executor may well begin further back.
    executor.say(tokens=step(attach.stream_id, 1, [6, 7]), ended=[_ended(attach.stream_id, 3)])
    tokens = await event(call, "tokens")
    assert (tokens.offset, tokens.token_ids) == (2, [7])
    assert (await event(call, "finished")).reason == api.FINISH_REASON_LENGTH
    assert await call.read() is grpc.aio.EOF
    await quiet(executor)


async def test_a_client_is_told_that_its_pages_were_lost(frontend: Frontend) -> None:
    call = frontend.generate()
    submit = await frontend.executor.accept()
    await event(call, "accepted")
    frontend.executor.say(recomputed=[submit.stream_id, submit.stream_id + 1])
    assert (await event(call, "notice")).kind == api.NOTICE_KIND_RECOMPUTED


async def test_a_request_that_is_not_accepted_is_submitted_again_with_the_time_that_is_left(
    frontend: Frontend,
) -> None:
    executor = frontend.executor
    call = frontend.generate(timeout=100)
    first = await executor.hear("submit")
    assert 0 < first.timeout_ms <= 100_000
    await asyncio.sleep(0.5)
    await frontend.restart_executor()
    second = await executor.accept()
    assert second.timeout_ms <= first.timeout_ms - 500
    second.timeout_ms = first.timeout_ms
    assert second == first
    await event(call, "accepted")  # and no notice: the client had nothing to lose yet


async def test_no_deadline_is_none(frontend: Frontend) -> None:
    call = frontend.generate()
    assert (await frontend.executor.hear("submit")).timeout_ms == 0
    call.cancel()


async def test_the_longest_deadline_fits_the_record(frontend: Frontend) -> None:
    call = frontend.generate(timeout=1e8)
    assert (await frontend.executor.hear("submit")).timeout_ms <= 1 << 32
    call.cancel()


async def test_a_request_that_waits_for_an_executor_ends_with_its_deadline(frontend: Frontend) -> None:
    await frontend.executor.stop()
    await frontend.until(False)
    began = time.monotonic()
    error = await status(frontend.generate(timeout=0.4))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began < 1.5
    async with asyncio.timeout(1):
        while frontend.link.streams:
            await asyncio.sleep(0.01)
    await frontend.executor.start()
    await frontend.until(True)
    # It was never accepted; the cancel is for the case that it was sent to the executor before.
    assert (await frontend.executor.hear("cancel")).request_id == "one"
    await quiet(frontend.executor)


async def test_without_any_executor_yet_the_answer_is_unavailable(tmp_path: Path) -> None:
    link = ExecutorLink(FakeExecutor(tmp_path).address, lambda: None)
    with pytest.raises(Exception, match="no executor is ready yet"):
        link.served()


# --- resume ---


async def test_an_executor_two_versions_ahead_is_not_used(tmp_path: Path) -> None:
    executor = FakeExecutor(tmp_path, described(protocol=PROTOCOL + 2))
    await executor.start()
    link = ExecutorLink(executor.address, lambda: None)
    running = asyncio.create_task(link.run())
    with capture_logs() as said:
        async with asyncio.timeout(5):
            while not said:
                await asyncio.sleep(0.01)
    running.cancel()
    await executor.stop()
    assert "upgrade the frontend" in said[0]["reason"]
    assert not link.connected and link.model is None


async def test_resume_replays_and_suppresses_what_the_client_has(frontend: Frontend) -> None:
    executor = frontend.executor
    message = api.GenerateRequest(request_id="one", text="ab", n=2)
    call = frontend.stub.Resume(api.ResumeRequest(request_id="one", positions=[api.ResumePosition(index=1, offset=2)]))
    attach = await executor.hear("attach")
    assert attach.describe
    assert [(one.index, one.offset) for one in attach.positions] == [(1, 2)]

    # The executor dies before it answers: the same question again.
    await frontend.restart_executor()
    again = await executor.hear("attach")
    assert again == attach
    executor.say(
        records=[ex.Record(stream_id=again.stream_id, request=message.SerializeToString(), prompt_tokens=4)],
        tokens=step(again.stream_id, 0, [40, 41, 42], index=1),
        ended=[_ended(again.stream_id, 3, index=1), _ended(again.stream_id, 0, index=0)],
    )
    accepted = await event(call, "accepted")
    assert (accepted.request_id, accepted.prompt_tokens) == ("one", 4)
    assert (await event(call, "finished")).index == 0
    tokens = await event(call, "tokens")
    assert (tokens.index, tokens.offset, tokens.token_ids) == (1, 2, [42])
    assert (await event(call, "finished")).usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (ex.FAILURE_NOT_FOUND, grpc.StatusCode.NOT_FOUND),
        (ex.FAILURE_OUT_OF_RANGE, grpc.StatusCode.OUT_OF_RANGE),
        (ex.FAILURE_TAKEN_OVER, grpc.StatusCode.ABORTED),
    ],
)
async def test_a_refusal_ends_the_stream_and_is_the_last_word(
    frontend: Frontend, failure: ex.Failure, code: grpc.StatusCode
) -> None:
    call = frontend.stub.Resume(api.ResumeRequest(request_id="one"))
    attach = await frontend.executor.hear("attach")
    frontend.executor.say(failed=[ex.Failed(stream_id=attach.stream_id, failure=failure)])
    assert (await status(call)).code() is code


async def test_a_stream_that_was_taken_over_takes_nothing_back(frontend: Frontend) -> None:
    """Even while its handler is stuck in a write to a client that does not read."""
    stream = ClientStream(7, "one", frontend.link.served().tokenizer, 64)
    stream.describe = True
    frontend.link.open(stream)
    await frontend.executor.hear("attach")
    frontend.executor.say(failed=[ex.Failed(stream_id=7, failure=ex.FAILURE_TAKEN_OVER)])
    async with asyncio.timeout(5):
        await stream.drain()
    await frontend.restart_executor()
    await quiet(frontend.executor)
    frontend.link.close(stream, gone=True)
    await quiet(frontend.executor)


# --- stop strings ---


async def test_a_stop_string_is_reported_until_the_executor_has_heard(frontend: Frontend) -> None:
    executor, tokenizer = frontend.executor, frontend.link.served().tokenizer
    request = api.GenerateRequest(request_id="one", text="ab")
    request.stopping.stop.append("END")
    call = frontend.stub.Generate(request)
    submit = await executor.accept()
    await event(call, "accepted")
    ids = tokenizer.encode("some ENDless")
    executor.say(tokens=step(submit.stream_id, 0, ids))
    stop = await executor.hear("stop_at")
    length = len(tokenizer.encode("some END"))
    assert (stop.request_id, stop.index, stop.length) == ("one", 0, length)
    assert (await event(call, "tokens")).text == "some "

    await frontend.restart_executor()
    attach = await executor.hear("attach")
    assert [one.offset for one in attach.positions] == [length]
    assert await executor.hear("stop_at") == stop
    await event(call, "notice")
    executor.say(ended=[_ended(attach.stream_id, length, ex.END_REASON_STOP)])
    finished = await event(call, "finished")
    assert (finished.reason, finished.usage.completion_tokens) == (api.FINISH_REASON_STOP, length)
    await frontend.restart_executor()
    await quiet(executor)


# --- outputs that are ranked ---


async def test_outputs_held_for_a_ranking_go_on_where_they_were(frontend: Frontend) -> None:
    executor, tokenizer = frontend.executor, frontend.link.served().tokenizer
    request = api.GenerateRequest(request_id="one", text="ab", best_of=2)
    request.stopping.stop.append("END")
    call = frontend.stub.Generate(request)
    submit = await executor.accept()
    assert (await event(call, "accepted")).request_id == "one"
    ids = tokenizer.encode("some END")
    executor.say(tokens=step(submit.stream_id, 0, [70], index=1, logprobs=[-1.0]))
    executor.say(tokens=step(submit.stream_id, 0, ids, index=0, logprobs=[-2.0] * len(ids)))
    stop = await executor.hear("stop_at")  # so both have arrived
    assert (stop.index, stop.length) == (0, len(ids))

    await frontend.restart_executor()
    attach = await executor.hear("attach")
    # The executor's numbers: nothing is ranked yet.
    assert {one.index: one.offset for one in attach.positions} == {0: len(ids), 1: 1}
    assert await executor.hear("stop_at") == stop
    await event(call, "notice")
    executor.say(
        tokens=step(attach.stream_id, 1, [71], index=1, logprobs=[-1.0]),
        ended=[_ended(attach.stream_id, len(ids), ex.END_REASON_STOP), _ended(attach.stream_id, 2, index=1)],
    )
    tokens = await event(call, "tokens")
    assert (tokens.index, tokens.offset, tokens.token_ids, tokens.logprobs) == (0, 0, [70, 71], [])
    assert (await event(call, "finished")).index == 0
    assert await call.read() is grpc.aio.EOF
    await quiet(executor)


# --- clients that go away ---


@pytest.mark.parametrize("grace", [0, 7])
async def test_a_client_that_goes_away_is_detached_for_its_grace(frontend: Frontend, grace: int) -> None:
    call = frontend.generate(response=_grace(grace))
    submit = await frontend.executor.accept()
    await event(call, "accepted")
    call.cancel()
    detach = await frontend.executor.hear("detach")
    assert (detach.stream_id, detach.grace_ms) == (submit.stream_id, grace * 1000)
    await frontend.restart_executor()
    await quiet(frontend.executor)


@pytest.mark.parametrize("grace", [0, 7])
async def test_a_client_that_goes_away_while_the_executor_is_away(frontend: Frontend, grace: int) -> None:
    """Without a grace its request is cancelled; with one the executor detaches what nobody claims."""
    call = frontend.generate(response=_grace(grace))
    await frontend.executor.accept()
    await event(call, "accepted")
    await frontend.executor.stop()
    await frontend.until(False)
    call.cancel()
    await asyncio.sleep(0.1)
    await frontend.executor.start()
    await frontend.until(True)
    if grace == 0:
        assert (await frontend.executor.hear("cancel")).request_id == "one"
    await quiet(frontend.executor)


async def test_a_stream_that_another_one_here_replaces_cancels_nothing(frontend: Frontend) -> None:
    first = frontend.generate()
    await frontend.executor.accept()
    await event(first, "accepted")
    await frontend.executor.stop()
    await frontend.until(False)
    second = frontend.generate()
    await asyncio.sleep(0.1)
    first.cancel()
    await asyncio.sleep(0.1)
    await frontend.executor.start()
    await frontend.executor.accept()
    await event(second, "accepted")
    await quiet(frontend.executor)


async def test_a_resumed_stream_that_breaks_ends_nothing(frontend: Frontend) -> None:
    call = frontend.stub.Resume(api.ResumeRequest(request_id="one"), timeout=0.3)
    await frontend.executor.hear("attach")
    assert (await status(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await frontend.executor.hear("detach")).grace_ms == 30_000


async def test_a_reader_that_does_not_read_is_detached_not_cancelled(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clientstream, "SLOW_SECONDS", 0.3)
    call = frontend.generate()
    submit = await frontend.executor.accept()
    executor, offset = frontend.executor, 0
    async with asyncio.timeout(20):
        while executor.heard.empty():  # until the transport's buffers are full
            executor.say(tokens=step(submit.stream_id, offset, [70] * 60_000))
            offset += 60_000
            await asyncio.sleep(0.05)
    assert (await executor.hear("detach")).grace_ms == 30_000
    assert frontend.link.streams == []
    executor.say(tokens=step(submit.stream_id, offset, [70] * 60_000))
    error = await status(call)  # reading again
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "Resume" in (error.details() or "")


# --- cancels ---


async def test_a_cancel_is_sent_again_after_a_break_and_in_the_end_forgotten(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.frontend.link._REPEAT_SECONDS", 0.3)
    await frontend.stub.Cancel(api.CancelRequest(request_id="elsewhere"))
    assert (await frontend.executor.hear("cancel")).request_id == "elsewhere"
    await frontend.restart_executor()
    assert (await frontend.executor.hear("cancel")).request_id == "elsewhere"
    await asyncio.sleep(0.4)
    await frontend.restart_executor()
    await quiet(frontend.executor)


async def test_a_cancel_sent_into_a_break_is_sent_again_however_long_the_break(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.frontend.link._REPEAT_SECONDS", 0.2)
    await frontend.stub.Cancel(api.CancelRequest(request_id="elsewhere"))
    await frontend.executor.hear("cancel")
    await frontend.executor.stop()
    await frontend.until(False)
    await asyncio.sleep(0.4)
    await frontend.executor.start()
    assert (await frontend.executor.hear("cancel")).request_id == "elsewhere"


async def test_a_cancel_waits_for_an_executor_as_long_as_it_takes(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.frontend.link._REPEAT_SECONDS", 0.1)
    await frontend.executor.stop()
    await frontend.until(False)
    await frontend.stub.Cancel(api.CancelRequest(request_id="elsewhere"))
    await asyncio.sleep(0.3)
    await frontend.executor.start()
    assert (await frontend.executor.hear("cancel")).request_id == "elsewhere"


async def test_a_request_is_cancelled_that_is_not_accepted_yet(frontend: Frontend) -> None:
    executor = frontend.executor
    call = frontend.generate()
    submit = await executor.hear("submit")
    await frontend.stub.Cancel(api.CancelRequest(request_id="one"))
    await executor.hear("cancel")  # which finds nothing there yet
    await frontend.restart_executor()
    await executor.hear("cancel")
    submit = await executor.hear("submit")
    await executor.hear("cancel")
    executor.say(accepted=[ex.Accepted(stream_id=submit.stream_id)])
    await executor.hear("cancel")
    executor.say(ended=[_ended(submit.stream_id, 0, ex.END_REASON_CANCELLED)])
    await event(call, "accepted")
    assert (await event(call, "finished")).reason == api.FINISH_REASON_CANCELLED


async def test_a_request_that_comes_after_a_cancel_of_its_id_is_not_meant(frontend: Frontend) -> None:
    await frontend.stub.Cancel(api.CancelRequest(request_id="one"))
    await frontend.executor.hear("cancel")
    call = frontend.generate()
    await frontend.executor.accept()
    await event(call, "accepted")
    await frontend.restart_executor()
    await frontend.executor.hear("attach")
    await quiet(frontend.executor)


# --- faults of the executor ---


async def test_an_answer_that_makes_no_sense_breaks_no_stream(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.frontend.link._FAULT_SECONDS", 0.01)
    call = frontend.generate()
    submit = await frontend.executor.accept()
    await event(call, "accepted")
    frontend.executor.say(tokens=step(submit.stream_id, 0, [5], index=3))
    attach = await frontend.executor.hear("attach")
    await event(call, "notice")
    frontend.executor.say(tokens=step(attach.stream_id, 0, [5]), ended=[_ended(attach.stream_id, 1)])
    assert (await event(call, "tokens")).token_ids == [5]
    await event(call, "finished")


async def test_as_many_streams_as_there_are_places(frontend: Frontend) -> None:
    calls = [frontend.generate(str(number)) for number in range(8)]
    for _ in calls:
        await frontend.executor.accept()
    error = await status(frontend.generate("more"))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "8 streams" in (error.details() or "")
    calls[0].cancel()
    await frontend.executor.hear("detach")
    again = frontend.generate("more")
    await frontend.executor.accept()
    await event(again, "accepted")


async def test_a_frontend_that_shuts_down_sends_no_cancel(frontend: Frontend) -> None:
    call = frontend.generate()
    await frontend.executor.accept()
    await event(call, "accepted")
    frontend.servicer.draining = True
    call.cancel()  # as a server does that stops
    assert (await frontend.executor.hear("detach")).grace_ms == 30_000
    assert (await status(frontend.generate("two"))).code() is grpc.StatusCode.UNAVAILABLE


def _ended(stream_id: int, length: int, reason: ex.EndReason = ex.END_REASON_LENGTH, index: int = 0) -> ex.Ended:
    return ex.Ended(stream_id=stream_id, index=index, reason=reason, length=length)


def _grace(seconds: int) -> api.ResponseOptions:
    options = api.ResponseOptions()
    options.detach_grace.FromSeconds(seconds)
    return options
