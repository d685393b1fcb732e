"""Small tokenizers, a description of a model, and an executor that does what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.executor.v1 import executor_pb2_grpc as ex_grpc
from pagehold.runtime.channel import server_options
from services.frontend.tokenizer import ModelTokenizer
from services.frontend.validation import ServedModel

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS = 2
# Some of them are two of the three or four bytes of a character.
MERGES = ("t h", "th e", "Ġ the", "i n", "Ġ a", "e r", "ð Ł", "â Ĥ", "Ð ½", "a b", "b a")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_level() -> Tokenizer:
    """Byte-level BPE: ids 0 to 2 are special, then the bytes, then what the merges make."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As SentencePiece models have it: `▁` for a space, a token for each byte, the first space trimmed."""
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁a", "b", "c", "."]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def described(tokenizer: Tokenizer | None = None, **fields: Any) -> ex.DescribeResponse:
    tokenizer = tokenizer or byte_level()
    values: dict[str, Any] = {
        "served_model_name": "tiny",
        "fingerprint": "f0",
        "max_model_len": 64,
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_ids": [EOS],
        "tokenizer_json": tokenizer.to_str().encode(),
        "chat_template": TEMPLATE,
        "page_size": 16,
        "pages": 64,
    }
    return ex.DescribeResponse(**{**values, **fields})


def served(tokenizer: Tokenizer | None = None, **fields: Any) -> ServedModel:
    description = described(tokenizer, **fields)
    return ServedModel(description, ModelTokenizer(description))


def step(stream_id: int, offset: int, ids: list[int], index: int = 0, logprobs: list[float] = []) -> ex.StepTokens:  # noqa: B006
    return ex.StepTokens(
        stream_ids=[stream_id],
        indexes=[index],
        offsets=[offset],
        counts=[len(ids)],
        token_ids=ids,
        logprobs=logprobs,
    )


class FakeExecutor(ex_grpc.ExecutorServiceServicer):
    """Hears what the frontend says, and says only what the test tells it to."""

    def __init__(self, folder: Path, description: ex.DescribeResponse | None = None) -> None:
        self.address = f"unix:{folder / 'executor.sock'}"
        self._path = folder / "executor.sock"
        self.description = description or described()
        self.heard: asyncio.Queue[ex.ConnectRequest] = asyncio.Queue()
        self._say: asyncio.Queue[ex.ConnectResponse] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self.heard, self._say = asyncio.Queue(), asyncio.Queue()
        self._server = grpc.aio.server(options=server_options())
        ex_grpc.add_ExecutorServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def hear(self, kind: str) -> Any:
        """The next message, which must be of this kind."""
        message = await asyncio.wait_for(self.heard.get(), 5)
        assert message.WhichOneof("message") == kind, message
        return getattr(message, kind)

    def say(self, **fields: Any) -> None:
        self._say.put_nowait(ex.ConnectResponse(**fields))

    async def accept(self) -> ex.Submit:
        """Takes the next submitted request and accepts it."""
        submit: ex.Submit = await self.hear("submit")
        self.say(accepted=[ex.Accepted(stream_id=submit.stream_id, prompt_tokens=len(submit.prompt))])
        return submit

    # --- the service ---

    async def Describe(self, request: ex.DescribeRequest, context: Any) -> ex.DescribeResponse:
        return self.description

    async def GetLoad(self, request: ex.GetLoadRequest, context: Any) -> ex.GetLoadResponse:
        return ex.GetLoadResponse(pages=self.description.pages)

    async def Connect(self, requests: AsyncIterator[ex.ConnectRequest], context: Any) -> None:
        heard, say = self.heard, self._say

        async def write() -> None:
            while True:
                await context.write(await say.get())

        writer = asyncio.create_task(write())
        try:
            async for message in requests:
                heard.put_nowait(message)
        finally:
            writer.cancel()
