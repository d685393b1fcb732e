"""Streams from outside, through the Python client, which resumes by itself."""

from __future__ import annotations

import asyncio

from pagehold.client import Client
from pagehold.v1 import inference_pb2 as api
from tests.faults.streams import Answer, Heard, renamed

RESUME_SECONDS = 60.0  # a frontend's container that drains is started again only after it


class ClientLoad:
    """Streams under way, each with a client of its own, and what each has heard so far."""

    def __init__(self, address: str, messages: list[api.GenerateRequest]) -> None:
        self.heard = [Heard.of(message) for message in messages]
        self._tasks = [
            asyncio.create_task(_generate(address, message, heard))
            for message, heard in zip(messages, self.heard, strict=True)
        ]

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    @property
    def any_over(self) -> bool:
        return any(task.done() for task in self._tasks)

    async def reach(self, tokens: int) -> None:
        """Waits until every output has this many more tokens than now. None may end before: nothing would be shown."""
        wanted = [heard.least + tokens for heard in self.heard]
        while any(heard.least < want for heard, want in zip(self.heard, wanted, strict=True)):
            await asyncio.sleep(0.01)
            for task in self._tasks:
                if task.done():
                    task.result()
                    raise AssertionError("a stream ended before the fault")

    async def answers(self) -> list[Answer]:
        await asyncio.gather(*self._tasks)
        return [heard.answer for heard in self.heard]


async def _generate(address: str, message: api.GenerateRequest, heard: Heard) -> None:
    async with Client(address, resume_seconds=RESUME_SECONDS) as client:
        async for response in client.generate(message):
            heard.take(response)
    assert heard.over


async def undisturbed(address: str, messages: list[api.GenerateRequest]) -> list[Answer]:
    """The reference: the same bodies under other ids, with nothing killed."""
    return await ClientLoad(address, renamed(messages, "reference")).answers()
