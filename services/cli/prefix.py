"""`pagehold prefix list | unpin | pin`: prefixes whose pages stay cached until they are unpinned."""

from __future__ import annotations

import json
import sys
from typing import Any

import grpc

from pagehold.client import Client, make_request
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.settings import PrefixListSettings, PrefixPinSettings, PrefixUnpinSettings
from pagehold.runtime.statedir import StateDir
from pagehold.v1 import inference_pb2 as api
from services.cli.manager import NoAnswer, ask
from services.cli.terminal import CallFailed, run, sentence


def list_pins(settings: PrefixListSettings) -> int:
    """Returns the exit code."""
    try:
        found = ask(StateDir(settings.state_dir), lambda stub, seconds: _list(stub, seconds))
    except NoAnswer as error:
        return _refuse(str(error))
    if settings.json_:
        names = ("name", "tenant", "pages", "tokens")
        print(json.dumps([{name: getattr(pin, name) for name in names} for pin in found.pins]))
    elif found.pins:
        width = max(len(pin.name) for pin in found.pins)
        for pin in found.pins:
            print(f"{pin.name:<{width}}  tenant {pin.tenant}, {pin.tokens} tokens in {pin.pages} pages")
    else:
        print("no prefix is pinned")
    return 0


def _list(stub: Any, seconds: float) -> kv.ListPinsResponse:
    response: kv.ListPinsResponse = stub.ListPins(kv.ListPinsRequest(), timeout=seconds, wait_for_ready=True)
    return response


def unpin(settings: PrefixUnpinSettings) -> int:
    """Returns the exit code."""
    request = kv.UnpinRequest(tenant=settings.tenant, name=settings.name)
    try:
        answer = ask(
            StateDir(settings.state_dir),
            lambda stub, seconds: stub.Unpin(request, timeout=seconds, wait_for_ready=True),
        )
    except NoAnswer as error:
        return _refuse(str(error))
    if not answer.existed:
        return _refuse(f"tenant {settings.tenant} has pinned no prefix {settings.name}; see `pagehold prefix list`")
    print(f"unpinned {settings.name}: its pages stay cached until they are needed")
    return 0


def pin(settings: PrefixPinSettings) -> int:
    """Returns the exit code."""
    if not settings.text and not settings.system:
        return _refuse("nothing to pin; give it with --text or --system")
    return run(_pin(settings))


async def _pin(settings: PrefixPinSettings) -> None:
    request = make_request(_prompt(settings), model=settings.model, max_tokens=1, pin_prefix=settings.name)
    request.cache_salt = settings.salt
    async with Client(settings.address, resume_seconds=5.0) as client:
        try:
            size = (await client.models.GetServerInfo(api.GetServerInfoRequest(), timeout=10)).page_size
            tokens = 0
            async for response in client.generate(request):
                if response.HasField("accepted"):
                    tokens = response.accepted.prompt_tokens
        except grpc.aio.AioRpcError as error:
            raise CallFailed(sentence(error)) from error
    print(f"pinned {settings.name}: {tokens // size * size} tokens in {tokens // size} pages")


def _prompt(settings: PrefixPinSettings) -> Any:
    if not settings.system:
        return settings.text
    chat = [{"role": "system", "content": settings.system}]
    return [*chat, {"role": "user", "content": settings.text}] if settings.text else chat


def _refuse(message: str) -> int:
    print(f"pagehold prefix: {message}", file=sys.stderr)
    return 1
