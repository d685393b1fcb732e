"""What a frontend counts: streams as they are, answers as they ended, and how long the first token took."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from pagehold.admin.v1 import admin_pb2 as admin
from pagehold.admin.v1 import admin_pb2_grpc as admin_grpc
from pagehold.runtime.admin import serve_admin
from pagehold.v1 import inference_pb2 as api
from services.frontend import tally as module
from services.frontend.errors import invalid
from services.frontend.tally import BOUNDS, Tally, TallyServicer
from tests.unit.frontend.test_link import Frontend, _ended, event, frontend, status  # noqa: F401
from tests.unit.frontend.world import step


async def ask(frontend: Frontend, folder: Path) -> admin.GetTallyResponse:  # noqa: F811
    server = grpc.aio.server()
    serve_admin(server, TallyServicer(frontend.tally, frontend.link))
    server.add_insecure_port(f"unix:{folder}/tally")
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await admin_grpc.AdminServiceStub(channel).GetTally(admin.GetTallyRequest())
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        async with grpc.aio.insecure_channel(f"unix:{folder}/tally") as channel:
            found: admin.GetTallyResponse = await admin_grpc.AdminServiceStub(channel).GetTally(admin.GetTallyRequest())
            return found
    finally:
        await server.stop(0)


async def test_a_stream_waits_until_its_first_token(frontend: Frontend, tmp_path: Path) -> None:  # noqa: F811
    call = frontend.generate()
    submit = await frontend.executor.accept()
    await event(call, "accepted")
    before = await ask(frontend, tmp_path)
    assert (before.open, before.waiting, sum(before.counts)) == (1, 1, 0)
    frontend.executor.say(tokens=step(submit.stream_id, 0, [5, 6]))
    await event(call, "tokens")
    during = await ask(frontend, tmp_path)
    assert (during.open, during.waiting, sum(during.counts)) == (1, 0, 1)
    assert during.seconds > 0
    frontend.executor.say(tokens=step(submit.stream_id, 2, [7]), ended=[_ended(submit.stream_id, 3)])
    await event(call, "tokens")
    await event(call, "finished")
    assert await call.read() is grpc.aio.EOF
    after = await ask(frontend, tmp_path)
    assert (after.open, after.waiting, sum(after.counts), dict(after.ended)) == (0, 0, 1, {"OK": 1})


async def test_answers_count_by_how_they_ended(frontend: Frontend, tmp_path: Path) -> None:  # noqa: F811
    await status(frontend.stub.Generate(api.GenerateRequest()))
    await status(frontend.stub.Resume(api.ResumeRequest()))
    call = frontend.generate()
    await frontend.executor.accept()
    await event(call, "accepted")
    call.cancel()
    async with asyncio.timeout(10):
        while frontend.link.streams:
            await asyncio.sleep(0.01)
    found = await ask(frontend, tmp_path)
    assert dict(found.ended) == {"INVALID_ARGUMENT": 2, "CANCELLED": 1}
    assert sum(found.counts) == 0


def test_buckets_are_closed_above(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    tally = Tally()
    for seconds in (0.0, BOUNDS[0], BOUNDS[0] + 0.001, BOUNDS[-1] + 1):
        with tally.answer() as answer:
            now += seconds
            answer.first_token()
    assert (tally.counts[0], tally.counts[1], tally.counts[-1], sum(tally.counts)) == (2, 1, 1, 4)
    assert tally.seconds == pytest.approx(2 * BOUNDS[0] + 0.001 + BOUNDS[-1] + 1)


@pytest.mark.parametrize(("error", "code"), [(invalid("n", "no"), "INVALID_ARGUMENT"), (KeyError(), "INTERNAL")])
def test_errors_have_their_codes(error: Exception, code: str) -> None:
    tally = Tally()
    with pytest.raises(type(error)), tally.answer():
        raise error
    assert tally.ended == {code: 1}
