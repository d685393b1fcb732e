"""The public services over a real stack: what a backend calls, and what it gets."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import pagehold
from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from tests.conftest import Stack

pytestmark = pytest.mark.stack

SERVICES = ("pagehold.v1.InferenceService", "pagehold.v1.ModelService")
_ids = (f"api-{number}" for number in itertools.count())


@dataclass
class Answer:
    """What a stream said, put together by output."""

    accepted: api.Accepted = field(default_factory=api.Accepted)
    ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    finished: dict[int, api.Finished] = field(default_factory=dict)

    def take(self, response: api.GenerateResponse, base: int = 0) -> None:
        match response.WhichOneof("event"):
            case "accepted":
                self.accepted = response.accepted
            case "tokens":
                tokens = response.tokens
                assert self.accepted.request_id, "accepted comes first"
                ids = self.ids.setdefault(tokens.index, [])
                assert tokens.offset == base + len(ids)
                ids.extend(tokens.token_ids)
                self.text[tokens.index] = self.text.get(tokens.index, "") + tokens.text
                self.logprobs.setdefault(tokens.index, []).extend(tokens.logprobs)
            case "finished":
                assert response.finished.index not in self.finished
                self.finished[response.finished.index] = response.finished

    @property
    def reason(self) -> int:
        return self.finished[0].reason


def request(text: str | None = "Once upon a time", tokens: int = 16, **options: Any) -> api.GenerateRequest:
    """Greedy unless `sampling` says otherwise."""
    message = api.GenerateRequest(request_id=next(_ids), **options)
    if text is not None:
        message.text = text
    if not message.HasField("sampling"):
        message.sampling.temperature = 0.0
    message.stopping.max_tokens = tokens
    return message


def chat(*contents: str, tokens: int = 48, **options: Any) -> api.GenerateRequest:
    message = request(None, tokens, **options)
    for content in contents:
        message.chat.messages.add(role="user", content=content)
    return message


@pytest.fixture
async def channel(stack: Stack) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(stack.address) as channel:
        yield channel


@pytest.fixture
def inference(channel: grpc.aio.Channel) -> Any:
    return api_grpc.InferenceServiceStub(channel)


@pytest.fixture
def models(channel: grpc.aio.Channel) -> Any:
    return api_grpc.ModelServiceStub(channel)


async def collect(call: Any, base: int = 0) -> Answer:
    answer = Answer()
    async for response in call:
        answer.take(response, base)
    assert answer.finished, "an OK stream ends in finished"
    return answer


async def some(call: Any, tokens: int) -> Answer:
    """Reads until output 0 has so many tokens."""
    answer = Answer()
    while len(answer.ids.get(0, ())) < tokens:
        answer.take(await call.read())
    return answer


async def the_rest(call: Any, answer: Answer) -> None:
    """Goes on after `some`."""
    while (response := await call.read()) is not grpc.aio.EOF:
        answer.take(response)


# --- prompts ---


async def test_text_and_its_tokens_are_the_same_prompt(inference: Any) -> None:
    text = "The quick brown fox"
    prompt = (await inference.Tokenize(api.TokenizeRequest(text=text))).ids
    by_text = await collect(inference.Generate(request(text)))
    by_ids = await collect(inference.Generate(request(None, token_ids=api.TokenIds(ids=prompt))))
    assert by_text.ids == by_ids.ids and by_text.text == by_ids.text
    assert len(by_text.ids[0]) == 16
    assert by_text.accepted.prompt_tokens == len(prompt)
    assert by_text.reason == api.FINISH_REASON_LENGTH
    assert by_text.finished[0].usage.prompt_tokens == len(prompt)
    assert by_text.finished[0].usage.completion_tokens == 16
    assert by_text.text[0] == (await inference.Detokenize(api.DetokenizeRequest(ids=by_text.ids[0]))).text


async def test_chat(inference: Any) -> None:
    answer = await collect(inference.Generate(chat("What is the capital of France?")))
    assert "Paris" in answer.text[0]
    assert answer.reason == api.FINISH_REASON_STOP


async def test_an_id_is_made_up(inference: Any) -> None:
    message = request(tokens=2)
    message.request_id = ""
    answer = await collect(inference.Generate(message))
    assert len(answer.accepted.request_id) >= 16


async def test_characters_of_many_tokens_come_whole(inference: Any) -> None:
    """Biased towards the bytes of an emoji, the model speaks in parts of characters."""
    text = "👩‍👩‍👧‍👦🏳️‍🌈日本語"
    ids = list((await inference.Tokenize(api.TokenizeRequest(text=text))).ids)
    assert len(ids) > len(text)
    message = request("Emoji:", 64, sampling=api.Sampling(seed=5))
    message.stopping.ignore_eos = True
    for token in set(ids):
        message.sampling.logit_bias[token] = 60.0
    shown = ""
    answer = Answer()
    async for response in inference.Generate(message):
        answer.take(response)
        shown += response.tokens.text
        whole = (await inference.Detokenize(api.DetokenizeRequest(ids=answer.ids.get(0, [])))).text
        assert whole.startswith(shown.rstrip("\ufffd"))
    assert shown == (await inference.Detokenize(api.DetokenizeRequest(ids=answer.ids[0]))).text
    assert any(ord(character) > 127 for character in shown)


# --- sampling ---


async def test_a_seed_repeats_itself(inference: Any) -> None:
    def seeded(seed: int) -> api.GenerateRequest:
        return request(sampling=api.Sampling(temperature=1.0, seed=seed))

    first, again, other = await asyncio.gather(
        *(collect(inference.Generate(message)) for message in (seeded(1), seeded(1), seeded(2)))
    )
    assert first.ids == again.ids and first.text == again.text
    assert first.ids != other.ids


async def test_outputs_differ_and_the_first_is_that_of_a_single_one(inference: Any) -> None:
    sampling = api.Sampling(temperature=1.0, seed=11)
    three = await collect(inference.Generate(request(n=3, sampling=sampling)))
    one = await collect(inference.Generate(request(sampling=sampling)))
    assert sorted(three.finished) == [0, 1, 2]
    assert three.ids[0] == one.ids[0]
    assert len({tuple(ids) for ids in three.ids.values()}) == 3


async def test_logprobs(inference: Any) -> None:
    with_them = await collect(
        inference.Generate(request(n=2, sampling=api.Sampling(seed=3), response=api.ResponseOptions(logprobs=True)))
    )
    for index, ids in with_them.ids.items():
        assert len(with_them.logprobs[index]) == len(ids)
        assert all(-100 < logprob <= 0 for logprob in with_them.logprobs[index])
    without = await collect(inference.Generate(request()))
    assert without.logprobs[0] == []


# --- ends ---


async def test_a_stop_string(inference: Any) -> None:
    whole = await collect(inference.Generate(request(tokens=24)))
    stop = whole.text[0][20:26]  # over the borders of tokens, as likely as not
    message = request(tokens=24)
    message.stopping.stop.extend(["nothing like it", stop])
    answer = await collect(inference.Generate(message))
    assert answer.text[0] == whole.text[0][: whole.text[0].index(stop)]
    assert answer.reason == api.FINISH_REASON_STOP
    usage = answer.finished[0].usage
    assert usage.completion_tokens == len(answer.ids[0]) < 24
    assert answer.ids[0] == whole.ids[0][: usage.completion_tokens]
    # Whoever resumes hears the same end.
    again = await collect(inference.Resume(api.ResumeRequest(request_id=message.request_id)))
    assert (again.ids, again.text, again.finished) == (answer.ids, answer.text, answer.finished)


async def test_a_stop_token(inference: Any) -> None:
    whole = await collect(inference.Generate(request()))
    stop = whole.ids[0][6]
    message = request()
    message.stopping.stop_token_ids.append(stop)
    answer = await collect(inference.Generate(message))
    assert answer.ids[0] == whole.ids[0][: whole.ids[0].index(stop) + 1]
    assert answer.reason == api.FINISH_REASON_STOP


async def test_end_of_text_and_what_ignores_or_delays_it(inference: Any) -> None:
    question = "Answer with one word: what is the capital of France?"
    plain = await collect(inference.Generate(chat(question)))
    assert plain.reason == api.FINISH_REASON_STOP
    length = len(plain.ids[0])
    ignoring, delaying = chat(question, tokens=length + 8), chat(question, tokens=length + 8)
    ignoring.stopping.ignore_eos = True
    delaying.stopping.min_tokens = length + 4
    ignored = await collect(inference.Generate(ignoring))
    assert (len(ignored.ids[0]), ignored.reason) == (length + 8, api.FINISH_REASON_LENGTH)
    assert ignored.ids[0][:length] == plain.ids[0]
    delayed = await collect(inference.Generate(delaying))
    assert len(delayed.ids[0]) >= length + 4
    assert plain.ids[0][-1] not in delayed.ids[0][: length + 3]


async def test_cancel(inference: Any) -> None:
    message = request(tokens=2000)
    message.stopping.ignore_eos = True
    call = inference.Generate(message)
    answer = await some(call, 4)
    for _ in range(2):
        await inference.Cancel(api.CancelRequest(request_id=message.request_id))
    await the_rest(call, answer)
    assert answer.reason == api.FINISH_REASON_CANCELLED
    assert 4 <= len(answer.ids[0]) == answer.finished[0].usage.completion_tokens < 2000
    again = await collect(inference.Resume(api.ResumeRequest(request_id=message.request_id)))
    assert (again.ids, again.text, again.finished) == (answer.ids, answer.text, answer.finished)
    await inference.Cancel(api.CancelRequest(request_id="never-heard-of"))


async def test_a_deadline_ends_the_request(inference: Any) -> None:
    message = request(tokens=2000)
    message.stopping.ignore_eos = True
    message.response.detach_grace.FromSeconds(60)  # no grace outlives it
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(inference.Generate(message, timeout=1.0))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.sleep(0.3)  # the executor's clock for it started a little later
    again = await collect(inference.Resume(api.ResumeRequest(request_id=message.request_id)))
    assert again.reason == api.FINISH_REASON_CANCELLED
    assert 0 < len(again.ids[0]) < 2000


# --- streams that break ---


async def test_a_stream_that_breaks_ends_its_request(inference: Any) -> None:
    message = request(tokens=2000)
    message.stopping.ignore_eos = True
    call = inference.Generate(message)
    await some(call, 4)
    call.cancel()
    await asyncio.sleep(0.5)  # a Resume that comes at once would claim it
    again = await collect(inference.Resume(api.ResumeRequest(request_id=message.request_id)))
    assert again.reason == api.FINISH_REASON_CANCELLED


async def test_a_stream_that_breaks_within_its_grace_is_resumed(inference: Any) -> None:
    def graced() -> api.GenerateRequest:
        message = request(tokens=48, sampling=api.Sampling(temperature=1.0, seed=9))
        message.stopping.ignore_eos = True
        message.response.detach_grace.FromSeconds(20)
        return message

    whole = await collect(inference.Generate(graced()))
    message = graced()
    call = inference.Generate(message)
    heard = await some(call, 8)
    call.cancel()
    offset = len(heard.ids[0])
    rest = await collect(
        inference.Resume(
            api.ResumeRequest(request_id=message.request_id, positions=[api.ResumePosition(offset=offset)])
        ),
        offset,
    )
    assert heard.ids[0] + rest.ids[0] == whole.ids[0]
    assert heard.text[0] + rest.text[0] == whole.text[0]
    rest.finished[0].usage.cached_tokens = whole.finished[0].usage.cached_tokens  # the second may find the first's page
    assert rest.finished == whole.finished


async def test_resume_from_anywhere(inference: Any) -> None:
    message = request("Count: one, two,", 24, n=2, sampling=api.Sampling(temperature=0.7, seed=4))
    whole = await collect(inference.Generate(message))
    lengths = {index: len(ids) for index, ids in whole.ids.items()}
    for offset in (0, 1, 7, lengths[1] - 1, lengths[1]):
        rest = await collect(
            inference.Resume(
                api.ResumeRequest(
                    request_id=message.request_id,
                    positions=[
                        api.ResumePosition(index=0, offset=lengths[0]),
                        api.ResumePosition(index=1, offset=offset),
                    ],
                )
            ),
            offset,
        )
        assert 0 not in rest.ids
        assert rest.ids.get(1, []) == whole.ids[1][offset:]
        assert whole.text[1].endswith(rest.text.get(1, ""))
        before = (await inference.Detokenize(api.DetokenizeRequest(ids=whole.ids[1][:offset]))).text
        assert before.rstrip("\ufffd") + rest.text.get(1, "") == whole.text[1]
        assert rest.finished == whole.finished
        assert rest.accepted.prompt_tokens == whole.accepted.prompt_tokens


async def test_the_same_request_again_attaches_and_takes_over(inference: Any) -> None:
    message = request(tokens=64)
    message.stopping.ignore_eos = True
    first = inference.Generate(message)
    heard = await some(first, 4)
    second = await collect(inference.Generate(message))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await the_rest(first, heard)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert "taken" in (caught.value.details() or "")
    assert len(second.ids[0]) == 64
    assert second.ids[0][: len(heard.ids[0])] == heard.ids[0]
    # When it has ended too.
    third = await collect(inference.Generate(message))
    assert (third.ids, third.text, third.finished) == (second.ids, second.text, second.finished)


# --- everything else ---


async def test_tokenize_and_back(inference: Any) -> None:
    text = "Grüße, 世界! 😀\n\tdef f(x): return x + 1"
    ids = (await inference.Tokenize(api.TokenizeRequest(text=text))).ids
    assert (await inference.Detokenize(api.DetokenizeRequest(ids=ids))).text == text
    rendered = api.TokenizeRequest(chat=api.Chat(messages=[api.ChatMessage(role="user", content=text)]))
    assert len((await inference.Tokenize(rendered)).ids) > len(ids)
    # The very tokens that Generate counts.
    message = chat(text, tokens=1)
    answer = await collect(inference.Generate(message))
    assert answer.accepted.prompt_tokens == len((await inference.Tokenize(rendered)).ids)


async def test_a_long_text_is_tokenized(inference: Any) -> None:
    text = "A sentence of some words, many times over. " * 400
    ids = (await inference.Tokenize(api.TokenizeRequest(text=text))).ids
    assert (await inference.Detokenize(api.DetokenizeRequest(ids=ids))).text == text


async def test_models(models: Any) -> None:
    (model,) = (await models.ListModels(api.ListModelsRequest())).models
    assert model.name == "SmolLM2-135M-Instruct"
    assert model.max_model_len == 8192
    assert model.vocab_size == 49152
    assert 2 in model.eos_token_ids
    assert model.has_chat_template
    assert len(model.fingerprint) >= 32
    assert (await models.GetModel(api.GetModelRequest(name=model.name))).model == model
    assert (await models.GetModel(api.GetModelRequest())).model == model


async def test_server_info_and_load(models: Any, inference: Any) -> None:
    info = await models.GetServerInfo(api.GetServerInfoRequest())
    assert info.version == pagehold.__version__
    assert (info.device, info.dtype, info.deterministic) == ("cpu", "bfloat16", True)
    assert info.epoch >= 1 and info.page_size == 16 and info.speculation == "ngram"
    before = await models.GetLoad(api.GetLoadRequest())
    assert 0 < before.free_pages <= before.pages == info.pages
    message = request(tokens=48)
    message.stopping.ignore_eos = True
    call = inference.Generate(message)
    heard = await some(call, 2)
    during = await models.GetLoad(api.GetLoadRequest())
    assert during.running + during.waiting >= 1
    await the_rest(call, heard)
    after = await models.GetLoad(api.GetLoadRequest())
    assert after.decode_tokens >= before.decode_tokens + 47


async def test_health(channel: grpc.aio.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    for name in ("", *SERVICES):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, name
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="nothing"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    for name, status in ((SERVICES[0], "SERVING"), ("nothing", "SERVICE_UNKNOWN")):
        watch = health.Watch(health_pb2.HealthCheckRequest(service=name))
        first = await asyncio.wait_for(watch.read(), 5)
        assert first.status == health_pb2.HealthCheckResponse.ServingStatus.Value(status)
        with pytest.raises(TimeoutError):  # it stays open for the next change
            await asyncio.wait_for(watch.read(), 0.2)


async def test_reflection(channel: grpc.aio.Channel) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="pagehold.v1.GenerateRequest"),
    ]
    listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
    names = {service.name for service in listed.list_services_response.service}
    assert names >= {*SERVICES, "grpc.health.v1.Health"}
    assert described.file_descriptor_response.file_descriptor_proto
