"""`pagehold generate`: one question, its answer streamed to standard output."""

from __future__ import annotations

import sys
from typing import Any

from pagehold.client import Client
from pagehold.runtime.settings import GenerateSettings
from services.cli.terminal import run, sampling_options, stream_answer


def main(settings: GenerateSettings) -> int:
    return run(_generate(settings))


async def _generate(settings: GenerateSettings) -> None:
    text = sys.stdin.read() if settings.prompt == "-" else settings.prompt
    prompt: Any = text
    if not settings.raw:
        system = [{"role": "system", "content": settings.system}] if settings.system else []
        prompt = [*system, {"role": "user", "content": text}]
    async with Client(settings.address, resume_seconds=5.0) as client:
        answer = await stream_answer(client, prompt, sampling_options(settings))
    if settings.stats:
        print(f"pagehold: {answer}", file=sys.stderr)
