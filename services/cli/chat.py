"""`pagehold chat`: a conversation at the terminal. An empty line or Ctrl-D ends it."""

from __future__ import annotations

import asyncio
import sys

from pagehold.client import Client
from pagehold.runtime.settings import ClientSettings
from services.cli.terminal import run, sampling_options, stream_answer


def main(settings: ClientSettings) -> int:
    return run(_chat(settings))


async def _chat(settings: ClientSettings) -> None:
    messages = [{"role": "system", "content": settings.system}] if settings.system else []
    async with Client(settings.address, resume_seconds=5.0) as client:
        while line := await asyncio.to_thread(_read_line):
            messages.append({"role": "user", "content": line})
            answer = await stream_answer(client, messages, sampling_options(settings))
            messages.append({"role": "assistant", "content": answer.text})


def _read_line() -> str:
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline().strip()
