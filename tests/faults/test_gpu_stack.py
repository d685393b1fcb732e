"""A whole `--device cuda` stack, with stand-ins for the GPU: real processes, the kernels run by the CPU.

Only the device's memory and the kernels' hardware are stand-ins; who owns the pages, how they are handed over, and
who proves whose death before they are written again is the product.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from tests.conftest import Stack
from tests.faults.streams import Load, mixed, prefilled, undisturbed
from tests.models.tiny import Tiny, save_tiny

pytestmark = pytest.mark.stack

StartGpuStack = Callable[..., Stack]
TINY = Tiny("gpu", "mistral", {"hidden_size": 256, "head_dim": 64, "sliding_window": None})
TOKENS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "model"
    save_tiny(TINY, folder)
    return folder


@pytest.fixture
def start_gpu_stack(start_stack: Callable[..., Stack], model: Path) -> StartGpuStack:
    def start(**flags: object) -> Stack:
        return start_stack(
            device="cuda",
            cuda_driver="tests.device.gpu",
            model=model,
            kv_memory="8MiB",
            max_model_len=256,
            max_num_seqs=8,
            max_batch_tokens=64,
            deterministic=True,
            **flags,
        )

    return start


def messages() -> list[api.GenerateRequest]:
    return mixed(4, TOKENS)


async def test_executor_killed_pages_stay(start_gpu_stack: StartGpuStack) -> None:
    stack = start_gpu_stack(pool="ipc")
    reference = await undisturbed(stack.address, messages())

    load = Load(stack.address, messages())
    await load.reach(6)
    stack.kill("executor")
    assert await load.answers() == reference
    assert prefilled(stack.address) == 0
    assert all(api.NOTICE_KIND_RECOMPUTED not in one.notices for one in load.heard)
    with grpc.insecure_channel(stack.address) as channel:
        info = api_grpc.ModelServiceStub(channel).GetServerInfo(api.GetServerInfoRequest())
    assert (info.device, info.deterministic) == ("cuda", True)


async def test_manager_killed_pages_that_its_executor_gives_back_stay(start_gpu_stack: StartGpuStack) -> None:
    stack = start_gpu_stack(pool="vmm")
    reference = await undisturbed(stack.address, messages())

    load = Load(stack.address, messages())
    await load.reach(2)
    before = prefilled(stack.address)
    for _ in range(2):
        await load.reach(6)
        stack.kill("kvmanager")
    assert await load.answers() == reference
    assert prefilled(stack.address) == before
    assert all(api.NOTICE_KIND_RECOMPUTED not in one.notices for one in load.heard)


async def test_manager_killed_pages_that_cannot_be_exported_again_are_computed_again(
    start_gpu_stack: StartGpuStack,
) -> None:
    stack = start_gpu_stack(pool="ipc")
    reference = await undisturbed(stack.address, messages())

    load = Load(stack.address, messages())
    await load.reach(6)
    stack.kill("kvmanager")
    assert await load.answers() == reference
    assert all(api.NOTICE_KIND_RECOMPUTED in one.notices for one in load.heard)


async def test_manager_and_executor_killed_together(start_gpu_stack: StartGpuStack) -> None:
    stack = start_gpu_stack(pool="vmm")
    reference = await undisturbed(stack.address, messages())

    load = Load(stack.address, messages())
    await load.reach(6)
    pids = stack.pids()
    for component in ("kvmanager", "executor"):
        os.kill(pids[component], signal.SIGKILL)
    assert await load.answers() == reference
    assert all(api.NOTICE_KIND_RECOMPUTED in one.notices for one in load.heard)
