"""Whatever is wrong has one clear status that says what to do, and nobody else notices."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from tests.conftest import COMMAND, Stack, free_port
from tests.faults.streams import Heard, generate, request

pytestmark = pytest.mark.stack

ROOT = str(Path(__file__).parents[2])
LEAKS = ("Traceback", ROOT, "/dev/shm", "/home", "/tmp", "Error(", "Exception", ".py")
CONTEXT = 8192
VOCABULARY = 49_152
EXIT_CONFIG = 78
_numbers = itertools.count(1, 2)  # odd: seeded


@pytest.fixture(scope="module")
def alone(stack: Stack) -> Heard:
    """The good stream, undisturbed."""
    return asyncio.run(generate(stack.address, _good()))


def _good() -> api.GenerateRequest:
    message = request(next(_numbers), tokens=24, text="The lighthouse keeper wrote", seeded=True)
    message.request_id = f"good-{message.request_id}"
    message.sampling.seed = 77
    return message


@asynccontextmanager
async def undisturbed(stack: Stack, alone: Heard) -> AsyncIterator[None]:
    """A good stream runs meanwhile, and is byte-identical to the one that ran alone."""
    running = asyncio.create_task(generate(stack.address, _good()))
    await asyncio.sleep(0.05)
    yield
    assert (await running).answer == alone.answer


@pytest.fixture
async def channel(stack: Stack) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(stack.address) as channel:
        yield channel


def body(**fields: Any) -> api.GenerateRequest:
    return api.GenerateRequest(**{"text": "Hello", **fields})


CASES: dict[str, tuple[api.GenerateRequest, grpc.StatusCode, str]] = {
    "empty prompt": (body(text=""), grpc.StatusCode.INVALID_ARGUMENT, "text: is empty"),
    "no prompt": (api.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "set text, token_ids or chat"),
    "empty chat": (body(chat=api.Chat()), grpc.StatusCode.INVALID_ARGUMENT, "chat: has no messages"),
    "no tokens": (body(token_ids=api.TokenIds()), grpc.StatusCode.INVALID_ARGUMENT, "token_ids: is empty"),
    "longer than the context": (
        body(token_ids=api.TokenIds(ids=[5] * CONTEXT)),
        grpc.StatusCode.INVALID_ARGUMENT,
        f"token_ids: has {CONTEXT} tokens; the context holds {CONTEXT}",
    ),
    "10 MB prompt": (body(text="word " * 2_000_000), grpc.StatusCode.INVALID_ARGUMENT, "text: is far too long"),
    "message over the limit": (body(text="x" * (17 << 20)), grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
    "max_tokens 0": (
        body(stopping=api.Stopping(max_tokens=0)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "stopping.max_tokens: must be at least 1",
    ),
    "negative temperature": (
        body(sampling=api.Sampling(temperature=-0.5)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "sampling.temperature: must be a number 0 or more",
    ),
    "NaN in logit bias": (
        body(sampling=api.Sampling(logit_bias={7: math.nan})),
        grpc.StatusCode.INVALID_ARGUMENT,
        "sampling.logit_bias: the bias of token 7 must be a number within",
    ),
    "token id out of range": (
        body(token_ids=api.TokenIds(ids=[1, VOCABULARY])),
        grpc.StatusCode.INVALID_ARGUMENT,
        f"token_ids: token id {VOCABULARY} is not in the vocabulary of {VOCABULARY}",
    ),
    "stop token out of range": (
        body(stopping=api.Stopping(stop_token_ids=[2**32 - 1])),
        grpc.StatusCode.INVALID_ARGUMENT,
        "stopping.stop_token_ids: token id",
    ),
    "unknown model": (body(model="gpt"), grpc.StatusCode.NOT_FOUND, "model: not served here; this server has"),
    "long stop string": (
        body(stopping=api.Stopping(stop=["s" * 10_000])),
        grpc.StatusCode.INVALID_ARGUMENT,
        "stopping.stop: a string is longer than 512 characters",
    ),
    "n 0": (body(n=0), grpc.StatusCode.INVALID_ARGUMENT, "n: must be 1 to 64"),
    "control characters": (body(request_id="a\0b"), grpc.StatusCode.INVALID_ARGUMENT, "request_id: holds control"),
}


async def refused(call: Any, code: grpc.StatusCode, message: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is code
    said = caught.value.details() or ""
    assert message in said
    assert not [leak for leak in LEAKS if leak in said]


@pytest.mark.parametrize("name", CASES)
async def test_request(stack: Stack, alone: Heard, channel: grpc.aio.Channel, name: str) -> None:
    message, code, said = CASES[name]
    stub = api_grpc.InferenceServiceStub(channel)
    async with undisturbed(stack, alone):
        began = time.monotonic()
        await refused(stub.Generate(message), code, said)
        assert time.monotonic() - began < 3


async def test_resume(stack: Stack, alone: Heard, channel: grpc.aio.Channel) -> None:
    stub = api_grpc.InferenceServiceStub(channel)
    async with undisturbed(stack, alone):
        known = _good()
        heard = await generate(stack.address, known)

        def resume(index: int, offset: int, request_id: str = known.request_id) -> Any:
            position = api.ResumePosition(index=index, offset=offset)
            return stub.Resume(api.ResumeRequest(request_id=request_id, positions=[position]))

        await refused(resume(0, 0, "never-heard-of"), grpc.StatusCode.NOT_FOUND, "send it again with Generate")
        await refused(resume(0, 0, ""), grpc.StatusCode.INVALID_ARGUMENT, "request_id: is empty")
        for index, offset in ((0, len(heard.tokens) + 1), (0, 2**32 - 1), (1, 0), (2**32 - 1, 0)):
            said = "resume at the number of tokens you have"
            await refused(resume(index, offset), grpc.StatusCode.OUT_OF_RANGE, said)


async def test_an_id_in_use(stack: Stack, alone: Heard, channel: grpc.aio.Channel) -> None:
    stub = api_grpc.InferenceServiceStub(channel)
    async with undisturbed(stack, alone):
        message = _good()
        running = asyncio.create_task(generate(stack.address, message))
        await asyncio.sleep(0.2)
        other = api.GenerateRequest()
        other.CopyFrom(message)
        other.text += "!"
        await refused(stub.Generate(other), grpc.StatusCode.ALREADY_EXISTS, "choose another id")
        assert (await running).answer == alone.answer
        await refused(stub.Generate(other), grpc.StatusCode.ALREADY_EXISTS, "choose another id")


@pytest.mark.parametrize("data", [b"\x1a\x02\xff\xfe", b"\xff\xff\xff\xff", b"\x1a\xff\xff\xff\xff\x0f"])
async def test_bytes_that_are_no_message(stack: Stack, alone: Heard, channel: grpc.aio.Channel, data: bytes) -> None:
    async with undisturbed(stack, alone):
        call = channel.unary_stream("/pagehold.v1.InferenceService/Generate")
        await refused(call(data), grpc.StatusCode.INVALID_ARGUMENT, "strings must be UTF-8")


async def test_values_at_the_edge_are_served(stack: Stack, alone: Heard, channel: grpc.aio.Channel) -> None:
    """No value that passes the checks may bring a process down."""
    before = stack.pids()
    stub = api_grpc.InferenceServiceStub(channel)
    edges = [
        api.Sampling(top_k=2**32 - 1, seed=2**64 - 1),
        api.Sampling(temperature=1e-6, top_p=1e-45),
        api.Sampling(temperature=1e6, min_p=1.0),
        api.Sampling(temperature=1e-6, top_k=5, repetition_penalty=1e-3, logit_bias={5: 9e29, 6: 9e29, 7: -9e29}),
        api.Sampling(top_p=0.5, repetition_penalty=1e3, presence_penalty=2, frequency_penalty=-2),
        api.Sampling(temperature=1e-6, top_p=0.5, logit_bias=dict.fromkeys(range(4096), -9e29)),
    ]
    async with undisturbed(stack, alone):
        for sampling in edges:
            message = body(sampling=sampling, priority=-(2**31), stopping=api.Stopping(max_tokens=2))
            events = [one.WhichOneof("event") async for one in stub.Generate(message, timeout=60)]
            assert events[-1] == "finished"
    assert stack.pids() == before


async def test_a_request_that_never_fits_the_pool(start_stack: Callable[..., Stack]) -> None:
    """The context is checked first: it is the tighter bound for a prompt that breaks both."""
    stack = start_stack(kv_memory="8MiB", max_model_len=1024)
    async with grpc.aio.insecure_channel(stack.address) as channel:
        stub = api_grpc.InferenceServiceStub(channel)
        pages = (await api_grpc.ModelServiceStub(channel).GetLoad(api.GetLoadRequest())).pages
        assert pages * 16 < 1000
        long = api.TokenIds(ids=[50] * 1000)
        await refused(stub.Generate(body(token_ids=long)), grpc.StatusCode.RESOURCE_EXHAUSTED, "the page pool holds")
        wanted = body(stopping=api.Stopping(max_tokens=1000))
        await refused(stub.Generate(wanted), grpc.StatusCode.RESOURCE_EXHAUSTED, "the page pool holds")
        beyond = api.TokenIds(ids=[50] * 1024)
        await refused(stub.Generate(body(token_ids=beyond)), grpc.StatusCode.INVALID_ARGUMENT, "the context holds 1024")
        # Without max_tokens it is served as far as the pool goes.
        message = body(token_ids=api.TokenIds(ids=[50] * (pages * 16 - 4)), stopping=api.Stopping(ignore_eos=True))
        *_, last = [one async for one in stub.Generate(message)]
        assert last.finished.reason == api.FINISH_REASON_LENGTH
        assert last.finished.usage.completion_tokens == 5


# --- processes that must not start ---


def component(
    name: str, *flags: str, seconds: float = 30, environment: dict[str, str] | None = None
) -> tuple[int | None, list[str]]:
    """Exit code (None: it is still running, and was ended) and the lines that are meant for people."""
    process = subprocess.Popen(
        [*COMMAND, name, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        code = None
    assert "Traceback" not in output
    return code, [line for line in output.splitlines() if line.startswith("pagehold ")]


async def test_a_second_manager_on_the_same_state(stack: Stack, alone: Heard) -> None:
    before = stack.pids()
    async with undisturbed(stack, alone):
        code, lines = await asyncio.to_thread(component, "kvmanager", "--state-dir", str(stack.state_dir))
        assert code
        assert len(lines) == 1 and "--state-dir" in lines[0]
    assert stack.pids() == before


async def test_a_port_in_use(stack: Stack, alone: Heard, tmp_path: Path) -> None:
    async with undisturbed(stack, alone):
        flags = ("--state-dir", str(tmp_path / "state"), "--listen", stack.address)
        code, lines = await asyncio.to_thread(component, "frontend", *flags)
        assert code == EXIT_CONFIG
        assert len(lines) == 1 and stack.address in lines[0] and "--listen" in lines[0]


def test_a_pool_larger_than_memory(tmp_path: Path) -> None:
    state = Path("/dev/shm") / f"pagehold-test-huge-{os.getpid()}"
    listen = f"127.0.0.1:{free_port()}"
    code, lines = component("up", "--state-dir", str(state), "--listen", listen, "--kv-memory", "100TiB", seconds=60)
    assert code == EXIT_CONFIG
    (line,) = lines
    assert "--kv-memory" in line and "does not fit" in line
    assert not state.exists()


# --- executors that do not belong here ---


@dataclass(frozen=True)
class TinyModels:
    """Two small models, and a cache for their packed weights, so that the user's own stays clean."""

    llama: Path
    qwen: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    from tests.models.tiny import TINY, save_tiny

    folder = tmp_path_factory.mktemp("tiny")
    for kind in ("llama", "qwen3"):
        save_tiny(next(one for one in TINY if one.name == kind), folder / kind)
    return TinyModels(folder / "llama", folder / "qwen3", {"XDG_CACHE_HOME": str(folder / "cache")})


async def test_another_executor_beside_a_live_one(stack: Stack, alone: Heard, tiny: TinyModels) -> None:
    """It could never take over, so it does not wait for its turn."""
    before = stack.pids()
    own = ("--state-dir", str(stack.state_dir))
    async with undisturbed(stack, alone):
        for flags, environment, said in (
            (("--model", str(tiny.llama)), tiny.environment, "another model"),
            (("--page-size", "32"), {}, "another page size"),
        ):
            code, lines = await asyncio.to_thread(component, "executor", *own, *flags, environment=environment)
            assert code == EXIT_CONFIG
            assert len(lines) == 1 and said in lines[0] and "--state-dir" in lines[0]
    assert stack.pids() == before


async def test_a_successor_must_be_of_the_same_model_and_geometry(tiny: TinyModels) -> None:
    """As long as requests are kept, the dead executor's pages and logs are for its like alone."""
    state = Path("/dev/shm") / f"pagehold-test-like-{os.getpid()}"
    address = f"127.0.0.1:{free_port()}"
    pool = ("--kv-memory", "16MiB")
    llama = ("--model", str(tiny.llama), *pool)
    message = api.GenerateRequest(request_id="kept", text="a", stopping=api.Stopping(max_tokens=8, ignore_eos=True))
    with _components(state, tiny.environment) as start:
        start("kvmanager")
        first = start("executor", *llama)
        start("frontend", "--listen", address)
        heard = await generate(address, message, resume=True)
        first.kill()
        first.wait()
        for flags, said in ((("--model", str(tiny.qwen), *pool), "model"), ((*llama, "--page-size", "32"), "page")):
            code, lines = await asyncio.to_thread(
                component, "executor", "--state-dir", str(state), *flags, environment=tiny.environment
            )
            assert code == EXIT_CONFIG
            assert len(lines) == 1 and said in lines[0] and "--discard" in lines[0]
        start("executor", *llama)
        async with grpc.aio.insecure_channel(address) as channel:
            call = api_grpc.InferenceServiceStub(channel).Resume(api.ResumeRequest(request_id="kept"))
            again = Heard()
            async for response in call:
                again.take(response)
        assert again.answer == heard.answer


@contextmanager
def _components(state: Path, environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts components without a supervisor, so that one that is killed stays dead."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(name: str, *flags: str) -> subprocess.Popen[bytes]:
        words = [*COMMAND, name, "--state-dir", str(state), *flags]
        quiet = subprocess.DEVNULL
        processes.append(subprocess.Popen(words, stdout=quiet, stderr=quiet, env={**os.environ, **environment}))
        return processes[-1]

    try:
        yield start
    finally:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(state, ignore_errors=True)
