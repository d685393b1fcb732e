"""The runbook names commands, metrics and alerts that exist, and reckons as the pool does."""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Callable
from math import ceil
from pathlib import Path

import pytest

from pagehold.runtime.statedir import StateDir
from services.cli import status
from services.cli.main import COMMANDS, _read
from tests.conftest import Stack
from tests.deploy.commands import read_component
from tests.deploy.test_alerts import exported, rules
from tests.faults.streams import Load, request

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
MIB = 1 << 20


def commands() -> list[str]:
    """Every `pagehold` command line in a block of them, and every one within the text."""
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)).splitlines()
    inline = re.findall(r"`(?:sudo -u pagehold /opt/pagehold/bin/)?(pagehold [^`]+)`", PAGE)
    return sorted({line for line in blocks + inline if "COMPONENT" not in line})


@pytest.mark.parametrize("line", commands())
def test_every_command_is_understood(line: str) -> None:
    program, *words = shlex.split(line)
    assert program == "pagehold"
    if words[0] == "run":
        read_component(words, {})
        return
    length = next(n for n in (2, 1) if " ".join(words[:n]) in COMMANDS)
    name = " ".join(words[:length])
    _read(COMMANDS[name].settings, words[length:], name)


def test_the_commands_were_found() -> None:
    assert len(commands()) >= 15


def test_every_alert_has_its_row_and_no_other() -> None:
    assert re.findall(r"^\| (Pagehold\w+) \|", PAGE, re.MULTILINE) == [rule["alert"] for rule in rules()]


def test_every_metric_has_its_row_and_no_other() -> None:
    table = PAGE.partition("## Metrics")[2].partition("\n## ")[0]
    named = {name for row in table.splitlines() if row.startswith("| `") for name in re.findall(r"`(\w+)`", row)}
    assert named == {re.sub(r"(?<=seconds)_(bucket|count|sum)$", "", name) for name in exported()}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    for path in re.findall(r"`((?:deploy|pagehold)/[\w/.-]+)`", PAGE):
        assert (ROOT / path).exists(), path


@pytest.mark.stack
async def test_the_example_of_the_capacity(start_stack: Callable[..., Stack]) -> None:
    """Numbers of the page: 368,640 bytes a page, 1,455 pages in 512 MiB, 40 for 38 tokens and 600."""
    page_bytes = 16 * 30 * 2 * 3 * 64 * 2
    assert f"{page_bytes:,} bytes a" in PAGE and "so 512 MiB are 1,455 pages" in PAGE
    stack = start_stack(kv_memory="512MiB")
    folder = StateDir(stack.state_dir)
    assert status.collect(folder)["pool"]["pages"] == 512 * MIB // page_bytes - 1 == 1455

    assert ceil((38 + 600 - 1) / 16) == 40 and "637 tokens in 40 pages: 36 of them at" in PAGE and 1455 // 40 == 36
    message = request(0, tokens=600)
    message.request_id = "example"
    load = Load(stack.address, [message])
    answers = asyncio.create_task(load.answers())
    seen = []
    while not answers.done():
        seen += [one for one in status.collect(folder)["sequences"] if one["state"] == "running"]
        await asyncio.sleep(0.005)
    await answers
    prompt = seen[-1]["prompt_tokens"]
    at_the_end = ceil((prompt + 600 - 1) / 16)
    for one in seen:
        # The row's own length is read a moment before or after the tokens.
        assert one["pages"] <= at_the_end
    assert max(one["pages"] for one in seen) == at_the_end
