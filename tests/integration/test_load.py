"""64 clients at once: all complete, nobody waits for a neighbour to finish, hardly a slot is wasted."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvmanager.keys import words_key
from kvmanager.layout import HEADER_WORDS, Header, RequestLog, RowState, Tables, index_of
from pagehold.v1 import inference_pb2 as api
from tests.conftest import Stack
from tests.faults.streams import generate

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]  # 64 clients on cores that others use as well

CLIENTS = 64
NEW_TOKENS = 128


def _request(number: int, rng: random.Random) -> api.GenerateRequest:
    message = api.GenerateRequest(request_id=f"load-{number}")
    message.token_ids.ids.extend(rng.randrange(1000, 40_000) for _ in range(rng.randint(64, 512)))
    message.sampling.temperature = 0.0
    message.stopping.max_tokens = NEW_TOKENS
    message.stopping.ignore_eos = True
    return message


def slots(state_dir: Path) -> tuple[int, int, int]:
    """(tokens held, slots of pages with a token, slots of headroom) over all live rows, read from the files."""
    raw = (state_dir / "tables").read_bytes()
    header = np.frombuffer(raw, np.uint64, HEADER_WORDS)
    shape = (int(header[word]) for word in (Header.PAGES, Header.ROWS, Header.ROW_ENTRIES, Header.PAGE_SIZE))
    tables = Tables(memoryview(raw), *shape)
    page_size = tables.page_tokens.shape[1]
    held = written = headroom = 0
    for row in np.flatnonzero(tables.row_word & np.uint64(0xFF) == RowState.LIVE).tolist():
        path = state_dir / "records" / f"{words_key(tables.row_key[row])}.log"
        try:
            log = RequestLog(memoryview(path.read_bytes()))
        except FileNotFoundError:
            continue
        computed = log.outputs[index_of(int(tables.row_word[row]))].computed
        pages = -(-computed // page_size)
        held += computed
        written += pages * page_size
        headroom += (int(tables.row_length[row]) - pages) * page_size
    return held, written, headroom


async def test_64_clients(start_stack: Callable[..., Stack]) -> None:
    stack = start_stack(kv_memory="2GiB", prefix_cache=False)
    rng = random.Random(64)
    messages = [_request(number, rng) for number in range(CLIENTS)]
    first_end: asyncio.Event = asyncio.Event()

    async def client(message: api.GenerateRequest) -> int:
        heard = await generate(stack.address, message)
        first_end.set()
        return len(heard.tokens)

    peak = (0, 1, 0)
    tasks = [asyncio.create_task(client(message)) for message in messages]
    while not all(task.done() for task in tasks):
        sample = await asyncio.to_thread(slots, stack.state_dir)
        peak = max(peak, sample)
        await asyncio.sleep(0.1)
    counts = await asyncio.gather(*tasks)
    held, written, headroom = peak
    print(f"\npeak: {held} tokens in {written} allocated slots = {held / written:.1%}; headroom {headroom} slots")
    assert counts == [NEW_TOKENS] * CLIENTS
    assert held > CLIENTS * 64
    assert held / written >= 0.96


async def test_no_stream_waits_for_a_neighbour_to_finish(start_stack: Callable[..., Stack]) -> None:
    """Every stream has its first token before the first stream has its last."""
    stack = start_stack(kv_memory="1GiB")
    rng = random.Random(7)
    begun: set[int] = set()
    begun_at_first_end: list[int] = []

    async def client(number: int) -> None:
        import grpc

        from pagehold.v1 import inference_pb2_grpc as api_grpc

        async with grpc.aio.insecure_channel(stack.address) as channel:
            async for response in api_grpc.InferenceServiceStub(channel).Generate(_request(number, rng)):
                if response.WhichOneof("event") == "tokens":
                    begun.add(number)
                elif response.WhichOneof("event") == "finished":
                    begun_at_first_end.append(len(begun))

    await asyncio.gather(*(client(number) for number in range(16)))
    assert begun_at_first_end[0] == 16
