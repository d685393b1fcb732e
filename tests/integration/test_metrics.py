"""`--metrics-listen`: true figures of a running stack, also while a part of it is dead."""

from __future__ import annotations

import http.client
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import COMMAND, Stack, free_port
from tests.faults.streams import request, undisturbed

pytestmark = pytest.mark.stack

StartStack = Callable[..., Stack]


def get(address: str, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def scrape(address: str) -> dict[str, float]:
    """name{label="value",...} -> value."""
    status, text = get(address, "/metrics")
    assert status == 200
    found = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(one.labels.items()))
            found[f"{one.name}{{{labels}}}" if labels else one.name] = one.value
    return found


async def test_a_stack_tells_what_it_did_and_who_died(start_stack: StartStack) -> None:
    address = f"127.0.0.1:{free_port()}"
    stack = start_stack(metrics_listen=address)
    (answer,) = await undisturbed(stack.address, [request(0, tokens=20)])
    found = scrape(address)
    assert found['pagehold_answers_total{code="OK",name="frontend"}'] == 1
    assert found['pagehold_first_token_seconds_count{name="frontend"}'] == 1
    assert found['pagehold_streams_open{name="frontend"}'] == 0
    # The first one is sampled by the step that ends the prompt.
    assert len(answer.tokens) - 1 <= found["pagehold_decode_tokens_total"] <= len(answer.tokens)
    assert found["pagehold_pages"] == stack.status()["pool"]["pages"]
    assert found["pagehold_epoch"] == 1
    assert get(address, "/ready") == (200, "ready\n")
    assert get(address, "/")[0] == 404
    assert get(address, "/metrics", "POST")[0] == 405

    stack.kill("executor")
    deadline = time.monotonic() + 60
    while (found := scrape(address)).get("pagehold_epoch") != 2 or get(address, "/ready")[0] != 200:
        assert time.monotonic() < deadline
    assert found['pagehold_component_deaths_total{component="executor"}'] == 1
    assert found['pagehold_component_deaths_total{component="kvmanager"}'] == 0


def test_an_executor_that_waits_for_its_manager_is_not_ready(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    words = ["run", "executor", "--state-dir", str(tmp_path / "state"), "--kv-memory", "64MiB"]
    process = subprocess.Popen([*COMMAND, *words, "--metrics-listen", address])
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                assert get(address, "/ready") == (503, "waiting for executor\n")
                assert get(address, "/live") == (200, "live\n")
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        found = scrape(address)
        assert found['pagehold_component_ready{component="executor",name="executor"}'] == 0
        assert "pagehold_sequences_running" not in found
        assert "pagehold_pages" not in found
    finally:
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.parametrize("wrong", ["taken", "nonsense", "127.0.0.1:no"])
def test_a_wrong_address_ends_up_with_one_clear_line(wrong: str, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        address = f"127.0.0.1:{holder.getsockname()[1]}" if wrong == "taken" else wrong
        words = ["run", "kvmanager", "--state-dir", str(tmp_path / "state"), "--metrics-listen", address]
        done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 78
    assert done.stderr.splitlines() == [
        f"pagehold: cannot listen on {address}: in use or not allowed; choose another --metrics-listen"
    ]
