"""Every field of a request, checked before anybody else hears of it. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import grpc

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.v1 import inference_pb2 as api
from services.frontend.errors import RequestError, invalid
from services.frontend.ranking import outputs_asked
from services.frontend.tokenizer import ModelTokenizer

MOST_OUTPUTS: Final = 64
MOST_STOPS: Final = 16
LONGEST_STOP: Final = 512  # characters
LONGEST_ID: Final = 256  # bytes
LONGEST_PIN: Final = 128  # bytes
MOST_STOP_TOKENS: Final = 1024
MOST_BIASES: Final = 4096
# With these no logit leaves the range of a float, whatever a request combines.
LEAST_TEMPERATURE: Final = 2.0**-20  # a little below 1e-6, which no float is exactly
LARGEST_TEMPERATURE: Final = 1e6
LARGEST_PENALTY: Final = 1e3
LARGEST_BIAS: Final = 1e30


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the executor serves, and its tokenizer."""

    described: ex.DescribeResponse
    tokenizer: ModelTokenizer

    @property
    def name(self) -> str:
        return self.described.served_model_name


def check_request(request: api.GenerateRequest, model: ServedModel) -> None:
    """Everything but the prompt's length, which needs its tokens. Raises RequestError."""
    check_model(request.model, model)
    check_id(request.request_id)
    if len(request.cache_salt.encode()) > LONGEST_ID:
        raise invalid("cache_salt", f"longer than {LONGEST_ID} bytes")
    if request.HasField("n") and not 1 <= request.n <= MOST_OUTPUTS:
        raise invalid("n", f"must be 1 to {MOST_OUTPUTS}")
    if request.HasField("best_of") and not outputs_asked(request) <= request.best_of <= MOST_OUTPUTS:
        least = outputs_asked(request)
        raise invalid("best_of", f"must be {least} (n) to {MOST_OUTPUTS}: the best n of so many outputs are returned")
    _check_name("pin_prefix", request.pin_prefix, LONGEST_PIN)
    _check_sampling(request.sampling, model.described.vocab_size)
    _check_stopping(request.stopping, model.described.vocab_size)
    grace = request.response.detach_grace
    if grace.seconds < 0 or grace.nanos < 0 or grace.seconds > 86_400:
        raise invalid("response.detach_grace", "must be 0 to 24 hours")


def check_model(name: str, model: ServedModel) -> None:
    if name and name != model.name:
        raise RequestError(
            grpc.StatusCode.NOT_FOUND,
            "MODEL_NOT_FOUND",
            f"model: not served here; this server has {model.name!r}",
            "model",
        )


def check_id(request_id: str, required: bool = False) -> None:
    if required and not request_id:
        raise invalid("request_id", "is empty")
    _check_name("request_id", request_id, LONGEST_ID)


def _check_name(field: str, name: str, longest: int) -> None:
    if len(name.encode()) > longest:
        raise invalid(field, f"longer than {longest} bytes")
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        raise invalid(field, "holds control characters")


def check_resume(request: api.ResumeRequest) -> None:
    check_id(request.request_id, required=True)
    if len({position.index for position in request.positions}) < len(request.positions):
        raise invalid("positions", "names an output twice")


def check_detokenize(request: api.DetokenizeRequest, model: ServedModel) -> None:
    check_model(request.model, model)
    if len(request.ids) > model.described.max_model_len:
        raise invalid("ids", f"more than the {model.described.max_model_len} tokens of the context")
    _check_tokens("ids", request.ids, model.described.vocab_size)


def _check_range(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    inside = (low < value if open_low else low <= value) and value <= high
    if not math.isfinite(value) or not inside:
        bound = f"above {low:g}" if open_low else f"{low:g} or more"
        raise invalid(f"sampling.{name}", f"must be a number {bound} and at most {high:g}")


def _check_sampling(sampling: api.Sampling, vocab: int) -> None:
    for name, low, high, open_low in (
        ("temperature", 0.0, LARGEST_TEMPERATURE, False),
        ("top_p", 0.0, 1.0, True),
        ("min_p", 0.0, 1.0, False),
        ("repetition_penalty", 1 / LARGEST_PENALTY, LARGEST_PENALTY, False),
        ("presence_penalty", -2.0, 2.0, False),
        ("frequency_penalty", -2.0, 2.0, False),
    ):
        if sampling.HasField(name):
            _check_range(name, float(getattr(sampling, name)), low, high, open_low)
    if 0.0 < sampling.temperature < LEAST_TEMPERATURE:
        raise invalid("sampling.temperature", "is too small; 0 is greedy, else at least 1e-06")
    if len(sampling.logit_bias) > MOST_BIASES:
        raise invalid("sampling.logit_bias", f"more than {MOST_BIASES} entries")
    _check_tokens("sampling.logit_bias", sampling.logit_bias, vocab)
    for token, bias in sampling.logit_bias.items():
        if not abs(bias) <= LARGEST_BIAS:  # nor NaN
            raise invalid("sampling.logit_bias", f"the bias of token {token} must be a number within {LARGEST_BIAS:g}")


def _check_stopping(stopping: api.Stopping, vocab: int) -> None:
    if stopping.HasField("max_tokens") and stopping.max_tokens == 0:
        raise invalid("stopping.max_tokens", "must be at least 1; leave it out for as many as fit")
    if stopping.HasField("max_tokens") and stopping.min_tokens > stopping.max_tokens:
        raise invalid("stopping.min_tokens", "must not be more than max_tokens")
    if len(stopping.stop) > MOST_STOPS:
        raise invalid("stopping.stop", f"more than {MOST_STOPS} strings")
    for stop in stopping.stop:
        if not stop:
            raise invalid("stopping.stop", "holds an empty string")
        if len(stop) > LONGEST_STOP:
            raise invalid("stopping.stop", f"a string is longer than {LONGEST_STOP} characters")
    if len(stopping.stop_token_ids) > MOST_STOP_TOKENS:
        raise invalid("stopping.stop_token_ids", f"more than {MOST_STOP_TOKENS} ids")
    _check_tokens("stopping.stop_token_ids", stopping.stop_token_ids, vocab)


def _check_tokens(field: str, tokens: Collection[int], vocab: int) -> None:
    if tokens and (highest := max(tokens)) >= vocab:
        raise invalid(field, f"token id {highest} is not in the vocabulary of {vocab}")


def encode_prompt(request: api.GenerateRequest | api.TokenizeRequest, model: ServedModel) -> list[int]:
    """The prompt's tokens. Raises RequestError; lets nothing through that is far beyond the context."""
    if isinstance(request, api.GenerateRequest) and request.HasField("token_ids"):
        if len(request.token_ids.ids) >= model.described.max_model_len:
            raise _too_long("token_ids", model, len(request.token_ids.ids))
        _check_tokens("token_ids", request.token_ids.ids, model.described.vocab_size)
        return list(request.token_ids.ids)
    text, is_chat = prompt_text(request, model)
    return model.tokenizer.encode_chat(text) if is_chat else model.tokenizer.encode(text)


def prompt_text(request: api.GenerateRequest | api.TokenizeRequest, model: ServedModel) -> tuple[str, bool]:
    """The text to tokenize and whether it came through the chat template. Raises RequestError."""
    limit = model.described.max_model_len * model.tokenizer.longest_token
    which = request.WhichOneof("prompt")
    if which == "chat":
        if not request.chat.messages:
            raise invalid("chat", "has no messages")
        messages = request.chat.messages
        if len(messages) > model.described.max_model_len or sum(len(m.role) + len(m.content) for m in messages) > limit:
            raise _too_long("chat", model)
        rendered = model.tokenizer.render(messages)
        if len(rendered) > limit:
            raise _too_long("chat", model)
        return rendered, True
    if which != "text":
        raise invalid("prompt", "is missing: set text, token_ids or chat")
    if not request.text:
        raise invalid("text", "is empty")
    if len(request.text) > limit:
        # Not worth tokenizing: even the longest tokens would not bring it into the context.
        raise _too_long("text", model)
    return request.text, False


def check_prompt(request: api.GenerateRequest, prompt: list[int], model: ServedModel) -> int:
    """The prompt's tokens against the context; returns max_tokens resolved.

    A max_tokens beyond the context is cut to it: the output then ends with LENGTH. Without one the
    page pool is a bound too; a request that names more than the pool holds is the executor's to refuse.
    """
    which = request.WhichOneof("prompt") or "prompt"
    if not prompt:
        raise invalid(which, "is empty")
    room = model.described.max_model_len - len(prompt)
    if room < 1:
        raise _too_long(which, model, len(prompt))
    described = model.described
    if request.pin_prefix and len(prompt) < described.page_size:
        message = f"reserves whole pages of {described.page_size} tokens; the prompt has {len(prompt)} tokens"
        raise invalid("pin_prefix", message)
    stopping = request.stopping
    pool_room = described.pages * described.page_size - len(prompt) + 1
    wanted = stopping.max_tokens if stopping.HasField("max_tokens") else max(pool_room, stopping.min_tokens, 1)
    max_tokens = min(wanted, room)
    if stopping.min_tokens > max_tokens:
        raise invalid("stopping.min_tokens", f"only {max_tokens} tokens fit the context")
    return max_tokens


def _too_long(field: str, model: ServedModel, tokens: int | None = None) -> RequestError:
    what = f"has {tokens} tokens" if tokens is not None else "is far too long"
    return invalid(field, f"{what}; the context holds {model.described.max_model_len}, one of them for the answer")


def digest(request: api.GenerateRequest) -> bytes:
    """SHA-256 of the message as parsed, without its id and unknown fields, before defaults."""
    body = api.GenerateRequest()
    body.CopyFrom(request)
    body.ClearField("request_id")
    body.DiscardUnknownFields()
    return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()
