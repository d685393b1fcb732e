"""Streams an answer to the terminal, and turns a failed call into one line."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass
from typing import Any

import grpc

from pagehold.client import Client, make_request
from pagehold.runtime.settings import ClientSettings
from pagehold.v1 import inference_pb2 as api


class CallFailed(Exception):
    """The message is for the person at the terminal."""


@dataclass(slots=True)
class Answer:
    """What was streamed."""

    text: str
    usage: api.Usage
    first_seconds: float
    seconds: float

    def __str__(self) -> str:
        rate = self.usage.completion_tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.usage.prompt_tokens} prompt tokens ({self.usage.cached_tokens} cached), "
            f"{self.usage.completion_tokens} new in {self.seconds:.2f} s ({rate:.1f} tokens/s), "
            f"first after {self.first_seconds:.2f} s"
        )


def sampling_options(settings: ClientSettings) -> dict[str, Any]:
    names = ("model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    return {name: value for name in names if (value := getattr(settings, name)) not in (None, "", [])}


async def stream_answer(client: Client, prompt: Any, options: dict[str, Any]) -> Answer:
    """Writes the text to standard output as it comes. Raises CallFailed."""
    start = time.monotonic()
    first = 0.0
    parts: list[str] = []
    usage = api.Usage()
    try:
        async for response in client.generate(make_request(prompt, **options)):
            match response.WhichOneof("event"):
                case "tokens":
                    first = first or time.monotonic() - start
                    parts.append(response.tokens.text)
                    sys.stdout.write(response.tokens.text)
                    sys.stdout.flush()
                case "finished":
                    usage = response.finished.usage
    except grpc.aio.AioRpcError as error:
        raise CallFailed(sentence(error)) from error
    except ValueError as error:
        raise CallFailed(str(error)) from error
    finally:
        if parts:
            print(flush=True)
    return Answer("".join(parts), usage, first, time.monotonic() - start)


def sentence(error: grpc.aio.AioRpcError) -> str:
    """A failed call, in one line."""
    details = error.details() or "no details"
    if error.code() is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
        return "no frontend answers there; start one with `pagehold up`, or name it with --address"
    return f"{details} ({error.code().name})"


def run(work: Any) -> int:
    """Runs a coroutine to the end of the program: its failure is one line, Ctrl-C is silent."""
    try:
        asyncio.run(work)
    except CallFailed as failure:
        print(f"pagehold: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    return 0
