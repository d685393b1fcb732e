"""`pagehold prefix`: what it asks a manager and a frontend for, and clear refusals."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from pagehold.runtime.statedir import StateDir
from pagehold.v1 import inference_pb2 as api
from tests.unit.cli.command import Command


class Frontend:
    """Stands for a client of one whose prompts have as many tokens as they have letters."""

    asked: list[api.GenerateRequest] = []

    def __init__(self, address: str, resume_seconds: float) -> None:
        self.models = SimpleNamespace(GetServerInfo=self._info)

    async def __aenter__(self) -> Frontend:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def _info(self, request: api.GetServerInfoRequest, timeout: float) -> api.GetServerInfoResponse:
        return api.GetServerInfoResponse(page_size=16)

    async def generate(self, request: api.GenerateRequest) -> AsyncIterator[api.GenerateResponse]:
        self.asked.append(request)
        letters = len(request.text) + sum(len(message.content) for message in request.chat.messages)
        yield api.GenerateResponse(accepted=api.Accepted(prompt_tokens=letters))
        yield api.GenerateResponse(finished=api.Finished())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[api.GenerateRequest]:
    monkeypatch.setattr("services.cli.prefix.Client", Frontend)
    monkeypatch.setattr(Frontend, "asked", [])
    return Frontend.asked


def test_a_prefix_is_pinned_by_a_request_for_one_token(pagehold: Command, asked: list[api.GenerateRequest]) -> None:
    assert pagehold("prefix", "pin", "rules", "--text", "x" * 40, "--salt", "s") == 0
    (request,) = asked
    assert (request.pin_prefix, request.text, request.cache_salt) == ("rules", "x" * 40, "s")
    assert request.stopping.max_tokens == 1
    assert pagehold.out == "pinned rules: 32 tokens in 2 pages\n"


@pytest.mark.parametrize(
    ("flags", "roles"),
    [(["--system", "x" * 40], ["system"]), (["--system", "x" * 40, "--text", "hi"], ["system", "user"])],
)
def test_a_system_message_makes_a_chat(
    flags: list[str], roles: list[str], pagehold: Command, asked: list[api.GenerateRequest]
) -> None:
    assert pagehold("prefix", "pin", "rules", *flags) == 0
    assert [message.role for message in asked[0].chat.messages] == roles


def test_nothing_to_pin_is_an_error(pagehold: Command, asked: list[api.GenerateRequest]) -> None:
    assert pagehold("prefix", "pin", "rules") == 1
    assert "nothing to pin" in pagehold.err and not asked


def test_no_frontend_and_no_manager_are_said(pagehold: Command, state: StateDir) -> None:
    assert pagehold("prefix", "pin", "rules", "--text", "x", "--address", "127.0.0.1:1") == 1
    assert "no frontend answers there" in pagehold.err
    for words in (["list"], ["unpin", "rules"]):
        assert pagehold("prefix", *words, "--state-dir", state.root) == 1
        assert "no kvmanager runs on" in pagehold.err


def test_answers_of_a_manager(pagehold: Command, state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from pagehold.kv.v1 import kv_manager_pb2 as kv

    pins = [kv.Pin(name="rules", tenant="default", pages=2, tokens=32)]

    class Stub:
        def ListPins(self, request: kv.ListPinsRequest, **options: Any) -> kv.ListPinsResponse:
            return kv.ListPinsResponse(pins=pins)

        def Unpin(self, request: kv.UnpinRequest, **options: Any) -> kv.UnpinResponse:
            known = (request.tenant, request.name) in {(pin.tenant, pin.name) for pin in pins}
            pins.clear()
            return kv.UnpinResponse(existed=known)

    monkeypatch.setattr("services.cli.prefix.ask", lambda state, call: call(Stub(), 1.0))
    assert pagehold("prefix", "list", "--state-dir", state.root) == 0
    assert pagehold.out == "rules  tenant default, 32 tokens in 2 pages\n"
    assert pagehold("prefix", "list", "--json", "--state-dir", state.root) == 0
    assert json.loads(pagehold.out) == [{"name": "rules", "tenant": "default", "pages": 2, "tokens": 32}]
    assert pagehold("prefix", "unpin", "rules", "--state-dir", state.root) == 0
    assert pagehold("prefix", "unpin", "rules", "--state-dir", state.root) == 1
    assert "tenant default has pinned no prefix rules" in pagehold.err
    assert pagehold("prefix", "list", "--state-dir", state.root) == 0
    assert pagehold.out == "no prefix is pinned\n"
