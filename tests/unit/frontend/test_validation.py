"""Every bad field is named, with what to do about it."""

from __future__ import annotations

import re

import grpc
import pytest
from google.protobuf import text_format

from pagehold.v1 import inference_pb2 as api
from services.frontend.errors import RequestError
from services.frontend.validation import (
    MOST_BIASES,
    MOST_STOP_TOKENS,
    check_detokenize,
    check_id,
    check_model,
    check_prompt,
    check_request,
    check_resume,
    digest,
    encode_prompt,
)
from tests.unit.frontend.world import served

MODEL = served()  # a context of 64 tokens, a pool of 1024
VOCABULARY = MODEL.described.vocab_size


def parse(text: str) -> api.GenerateRequest:
    return text_format.Parse(text, api.GenerateRequest())


def resolve(request: api.GenerateRequest) -> int:
    """All checks in the order of a call; max_tokens as it is sent on."""
    check_request(request, MODEL)
    return check_prompt(request, encode_prompt(request, MODEL), MODEL)


BAD = {
    'text: ""': ("text", "empty"),
    "sampling {}": ("prompt", "set text, token_ids or chat"),
    "token_ids {}": ("token_ids", "empty"),
    "chat {}": ("chat", "no messages"),
    f"token_ids {{ ids: {VOCABULARY} }}": ("token_ids", f"{VOCABULARY} is not in the vocabulary"),
    f'text: "{"c" * 64}"': ("text", "64 tokens; the context holds 64"),
    f'text: "{"c" * 10_000}"': ("text", "far too long; the context holds 64"),
    f'chat {{ messages {{ role: "{"c" * 10_000}" }} }}': ("chat", "far too long"),
    "chat { " + "messages {} " * 65 + "}": ("chat", "far too long"),
    f'chat {{ messages {{ role: "user" content: "{"c" * 70}" }} }}': ("chat", "the context holds 64"),
    'text: "a" n: 0': ("n", "1 to 64"),
    'text: "a" n: 65': ("n", "1 to 64"),
    'text: "a" best_of: 0': ("best_of", "must be 1 (n) to 64"),
    'text: "a" n: 4 best_of: 3': ("best_of", "must be 4 (n) to 64"),
    'text: "a" n: 4 best_of: 65': ("best_of", "must be 4 (n) to 64"),
    'text: "a" pin_prefix: "a\\tb"': ("pin_prefix", "control"),
    f'text: "a" pin_prefix: "{"é" * 65}"': ("pin_prefix", "longer than 128 bytes"),
    'text: "ccccccccccccccc" pin_prefix: "a"': ("pin_prefix", "whole pages of 16 tokens; the prompt has 15"),
    f'text: "a" request_id: "{"i" * 257}"': ("request_id", "longer than 256"),
    'text: "a" request_id: "a\\nb"': ("request_id", "control"),
    f'text: "a" cache_salt: "{"i" * 257}"': ("cache_salt", "longer than 256"),
    'text: "a" sampling { temperature: -1 }': ("sampling.temperature", "0 or more"),
    'text: "a" sampling { temperature: nan }': ("sampling.temperature", "number"),
    'text: "a" sampling { temperature: inf }': ("sampling.temperature", "number"),
    'text: "a" sampling { top_p: 0 }': ("sampling.top_p", "above 0 and at most 1"),
    'text: "a" sampling { top_p: 1.5 }': ("sampling.top_p", "above 0 and at most 1"),
    'text: "a" sampling { min_p: -0.1 }': ("sampling.min_p", "0 or more and at most 1"),
    'text: "a" sampling { min_p: nan }': ("sampling.min_p", "0 or more and at most 1"),
    'text: "a" sampling { temperature: 1e-7 }': ("sampling.temperature", "0 is greedy, else at least 1e-06"),
    'text: "a" sampling { temperature: 1e7 }': ("sampling.temperature", "at most 1e+06"),
    'text: "a" sampling { repetition_penalty: 0 }': ("sampling.repetition_penalty", "0.001 or more and at most 1000"),
    'text: "a" sampling { repetition_penalty: 3e38 }': ("sampling.repetition_penalty", "at most 1000"),
    'text: "a" sampling { presence_penalty: 3 }': ("sampling.presence_penalty", "-2 or more and at most 2"),
    'text: "a" sampling { frequency_penalty: -3 }': ("sampling.frequency_penalty", "-2 or more and at most 2"),
    'text: "a" sampling { logit_bias { key: 5 value: nan } }': (
        "sampling.logit_bias",
        "token 5 must be a number within",
    ),
    'text: "a" sampling { logit_bias { key: 5 value: -inf } }': (
        "sampling.logit_bias",
        "token 5 must be a number within",
    ),
    'text: "a" sampling { logit_bias { key: 5 value: 3e38 } }': (
        "sampling.logit_bias",
        "token 5 must be a number within",
    ),
    f'text: "a" sampling {{ logit_bias {{ key: {VOCABULARY} value: 1 }} }}': ("sampling.logit_bias", "vocabulary"),
    'text: "a" stopping { max_tokens: 0 }': ("stopping.max_tokens", "at least 1"),
    'text: "a" stopping { max_tokens: 2 min_tokens: 3 }': ("stopping.min_tokens", "max_tokens"),
    'text: "a" stopping { min_tokens: 64 }': ("stopping.min_tokens", "only 63 tokens fit"),
    'text: "a" stopping { max_tokens: 90 min_tokens: 64 }': ("stopping.min_tokens", "only 63 tokens fit"),
    'text: "a" stopping { stop: "" }': ("stopping.stop", "empty"),
    f'text: "a" stopping {{ stop: "{"s" * 513}" }}': ("stopping.stop", "longer than 512"),
    'text: "a" stopping { ' + 'stop: "s" ' * 17 + "}": ("stopping.stop", "more than 16"),
    f'text: "a" stopping {{ stop_token_ids: {VOCABULARY} }}': ("stopping.stop_token_ids", "vocabulary"),
    'text: "a" stopping { ' + "stop_token_ids: 1 " * (MOST_STOP_TOKENS + 1) + "}": ("stopping.stop_token_ids", "more"),
    'text: "a" response { detach_grace { seconds: -1 } }': ("response.detach_grace", "0 to 24 hours"),
    'text: "a" response { detach_grace { seconds: 90000 } }': ("response.detach_grace", "0 to 24 hours"),
}


@pytest.mark.parametrize("body", BAD, ids=lambda body: str(body)[:60])
def test_bad_field(body: str) -> None:
    field, message = BAD[body]
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        resolve(parse(body))
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.field == field
    assert caught.value.message.startswith(f"{field}: ")


def test_too_many_biases() -> None:
    request = parse('text: "a"')
    for token in range(MOST_BIASES + 1):
        request.sampling.logit_bias[token] = 1.0
    with pytest.raises(RequestError, match="more than 4096"):
        resolve(request)


@pytest.mark.parametrize(
    "body",
    [
        'text: "a" sampling { temperature: 0 top_p: 1 top_k: 4294967295 min_p: 1 seed: 18446744073709551615 }',
        'text: "a" sampling { presence_penalty: -2 frequency_penalty: 2 repetition_penalty: 3 }',
        'text: "a" sampling { logit_bias { key: 0 value: -100 } } priority: -2147483648 n: 64',
        'text: "a" stopping { max_tokens: 5 min_tokens: 5 stop: "END" stop_token_ids: 0 ignore_eos: true }',
        'text: "a" n: 4 best_of: 4',
        'text: "a" best_of: 64',
        f'text: "{"c" * 16}" pin_prefix: "{"é" * 64}"',
        'text: "a" request_id: "é 1" model: "tiny" cache_salt: "salt" response { detach_grace { seconds: 86400 } }',
    ],
)
def test_good(body: str) -> None:
    resolve(parse(body))


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ('text: "a"', 63),
        ('text: "a" stopping { max_tokens: 5 }', 5),
        ('text: "a" stopping { max_tokens: 4294967295 }', 63),
        (f'text: "{"c" * 63}"', 1),
        ('text: "a" stopping { min_tokens: 63 }', 63),
    ],
)
def test_max_tokens_resolved_against_the_context(body: str, tokens: int) -> None:
    assert resolve(parse(body)) == tokens


@pytest.mark.parametrize(
    ("stopping", "tokens"),
    [
        ("", 31),  # as many as fit: prompt and answer, whose last token needs no page
        ("stopping { max_tokens: 40 }", 40),  # named: for the executor to refuse
        ("stopping { min_tokens: 40 }", 40),
    ],
)
def test_max_tokens_without_one_fit_the_pool(stopping: str, tokens: int) -> None:
    model = served(pages=2)
    request = parse(f'text: "cc" {stopping}')
    assert check_prompt(request, encode_prompt(request, model), model) == tokens


def test_the_model_by_its_name() -> None:
    check_model("", MODEL)
    check_model("tiny", MODEL)
    with pytest.raises(RequestError, match="'tiny'") as caught:
        check_model("other", MODEL)
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


def test_resume_and_cancel_need_an_id() -> None:
    for check in (lambda: check_resume(api.ResumeRequest()), lambda: check_id("", required=True)):
        with pytest.raises(RequestError, match="request_id: is empty"):
            check()
    twice = api.ResumeRequest(request_id="one", positions=[api.ResumePosition(offset=1), api.ResumePosition(offset=2)])
    with pytest.raises(RequestError, match="names an output twice"):
        check_resume(twice)


def test_detokenize() -> None:
    check_detokenize(api.DetokenizeRequest(ids=[0, VOCABULARY - 1]), MODEL)
    with pytest.raises(RequestError, match="not in the vocabulary"):
        check_detokenize(api.DetokenizeRequest(ids=[VOCABULARY]), MODEL)
    with pytest.raises(RequestError, match="more than the 64 tokens"):
        check_detokenize(api.DetokenizeRequest(ids=[1] * 65), MODEL)


def test_digest_leaves_out_the_id_and_nothing_else() -> None:
    base = parse('text: "a" request_id: "1" sampling { logit_bias { key: 5 value: 1 } logit_bias { key: 6 value: 2 } }')
    other = parse(
        'text: "a" request_id: "2" sampling { logit_bias { key: 6 value: 2 } logit_bias { key: 5 value: 1 } }'
    )
    assert digest(base) == digest(other)
    assert base.request_id == "1", "the request is left as it is"
    unknown = api.GenerateRequest.FromString(base.SerializeToString() + b"\xc0\x3e\x01")
    assert digest(unknown) == digest(base)
    # Before defaults: what is said is not the same as what is left out.
    for change in ("n: 1", 'model: "tiny"', "sampling { temperature: 1 }", "stopping {}"):
        changed = api.GenerateRequest()
        changed.CopyFrom(base)
        text_format.Merge(change, changed)
        assert digest(changed) != digest(base), change
