"""The client of llama.cpp's server, without the server."""

from __future__ import annotations

import asyncio
import json
import sys
from importlib import metadata
from typing import Any

import pytest
from peers_lib.requestfile import Request, draw
from peers_lib.worker import EngineError


@pytest.fixture
def llama_cpp(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, which reads the version of a distribution that is not in this environment."""
    monkeypatch.setattr(metadata, "version", lambda name: "0")
    monkeypatch.delitem(sys.modules, "peers_lib.engines.llama_cpp", raising=False)
    from peers_lib.engines import llama_cpp

    return llama_cpp


def read(llama_cpp: Any, data: bytes) -> list[dict[str, Any]]:
    async def all_of_it() -> list[dict[str, Any]]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return [event async for event in llama_cpp.events(reader)]

    return asyncio.run(all_of_it())


def chunked(*parts: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def test_events_are_read_across_chunks(llama_cpp: Any) -> None:
    data = chunked(b'data: {"a": 1}\n\nda', b'ta: {"b', b'": 2}\n\n', b": ping\n\ndata: [DONE]\n\n")
    assert read(llama_cpp, data) == [{"a": 1}, {"b": 2}]


def test_a_refusal_is_an_error(llama_cpp: Any) -> None:
    with pytest.raises(llama_cpp.HttpError, match=r"400 Bad Request .*too long"):
        read(llama_cpp, b'HTTP/1.1 400 Bad Request\r\n\r\n{"error": "too long"}')
    with pytest.raises(llama_cpp.HttpError, match="out of memory"):
        read(llama_cpp, chunked(b'error: {"message": "out of memory"}\n\n'))
    with pytest.raises(EOFError):
        read(llama_cpp, chunked(b'data: {"a": 1}\n\n')[:-20])


def test_tokens_that_were_not_told_are_counted(llama_cpp: Any) -> None:
    assert llama_cpp.fresh({"tokens": [5], "tokens_predicted": 1}, 0) == [5]
    assert llama_cpp.fresh({"tokens": [9], "tokens_predicted": 4}, 1) == [llama_cpp.UNKNOWN] * 2 + [9]
    assert llama_cpp.fresh({"tokens": [], "tokens_predicted": 4}, 4) == []


def test_every_request_has_a_slot_that_holds_it(llama_cpp: Any) -> None:
    assert llama_cpp.shape(draw(1, 8, (64, 64), 128)) == (8, 256)
    assert llama_cpp.shape([Request("a", (1,) * 200, 55, True, 0)]) == (1, 512)
    assert llama_cpp.shape(draw(1, 256, (1, 1), 1))[0] == 256
    with pytest.raises(EngineError, match="256 slots at most, 257 are wanted"):
        llama_cpp.shape(draw(1, 257, (1, 1), 1))


def test_the_request_is_greedy_and_of_token_ids(llama_cpp: Any) -> None:
    body = json.loads(llama_cpp.body(Request("a", (4, 5), 6, True, 0), prefix_cache=False))
    assert body["prompt"] == [4, 5] and body["n_predict"] == 6
    assert body["temperature"] == 0 and body["ignore_eos"] and body["stream"] and not body["cache_prompt"]
