"""Every field of a request, checked before anybody else hears of it. Pure."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Final

import grpc

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.v1 import inference_pb2 as api
from services.frontend.errors import RequestError, invalid
from services.frontend.tokenizer import ModelTokenizer

MOST_OUTPUTS: Final = 64
MOST_STOPS: Final = 16
LONGEST_STOP: Final = 512  # characters
LONGEST_ID: Final = 256  # bytes
MOST_STOP_TOKENS: Final = 1024
MOST_BIASES: Final = 4096


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


def check_id(request_id: str) -> None:
    if len(request_id.encode()) > LONGEST_ID:
        raise invalid("request_id", f"longer than {LONGEST_ID} bytes")
    if any(ord(character) < 32 or ord(character) == 127 for character in request_id):
        raise invalid("request_id", "holds control characters")


def _check_range(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    inside = (low < value if open_low else low <= value) and value <= high
    if not math.isfinite(value) or not inside:
        bound = f"above {low:g}" if open_low else f"{low:g} or more"
        limit = "" if high == math.inf else f" and at most {high:g}"
        raise invalid(f"sampling.{name}", f"must be a number {bound}{limit}")


def _check_sampling(sampling: api.Sampling, vocab: int) -> None:
    for name, low, high, open_low in (
        ("temperature", 0.0, math.inf, False),
        ("top_p", 0.0, 1.0, True),
        ("min_p", 0.0, 1.0, False),
        ("repetition_penalty", 0.0, math.inf, True),
        ("presence_penalty", -2.0, 2.0, False),
        ("frequency_penalty", -2.0, 2.0, False),
    ):
        if sampling.HasField(name):  # type: ignore[arg-type]
            _check_range(name, float(getattr(sampling, name)), low, high, open_low)
    if len(sampling.logit_bias) > MOST_BIASES:
        raise invalid("sampling.logit_bias", f"more than {MOST_BIASES} entries")
    for token, bias in sampling.logit_bias.items():
        _check_token("sampling.logit_bias", token, vocab)
        if not math.isfinite(bias):
            raise invalid("sampling.logit_bias", f"the bias of token {token} must be a finite number")


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
    for token in stopping.stop_token_ids:
        _check_token("stopping.stop_token_ids", token, vocab)


def _check_token(field: str, token: int, vocab: int) -> None:
    if token >= vocab:
        raise invalid(field, f"token id {token} is not in the vocabulary of {vocab}")


def prompt_text(request: api.GenerateRequest | api.TokenizeRequest, model: ServedModel) -> tuple[str, bool]:
    """The text to tokenize and whether it came through the chat template. Raises RequestError."""
    limit = model.described.max_model_len * model.tokenizer.longest_token
    which = request.WhichOneof("prompt")
    if which == "chat":
        if not request.chat.messages:
            raise invalid("chat", "has no messages")
        if sum(len(message.content) for message in request.chat.messages) > limit:
            raise _too_long("chat", model)
        return model.tokenizer.render(request.chat.messages), True
    if which != "text":
        raise invalid("prompt", "is missing: set text, token_ids or chat")
    if not request.text:
        raise invalid("text", "is empty")
    if len(request.text) > limit:
        # Not worth tokenizing: even the longest tokens would not bring it into the context.
        raise _too_long("text", model)
    return request.text, False


def check_prompt(request: api.GenerateRequest, prompt: list[int], model: ServedModel) -> int:
    """The prompt's tokens against vocabulary and context; returns max_tokens resolved.

    A max_tokens beyond the context is cut to it: the output then ends with LENGTH.
    """
    which = request.WhichOneof("prompt") or "prompt"
    if not prompt:
        raise invalid(which, "is empty")
    for token in prompt if which == "token_ids" else ():
        _check_token("token_ids", token, model.described.vocab_size)
    room = model.described.max_model_len - len(prompt)
    if room < 1:
        raise _too_long(which, model, len(prompt))
    stopping = request.stopping
    max_tokens = min(stopping.max_tokens, room) if stopping.HasField("max_tokens") else room
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
    body.DiscardUnknownFields()  # type: ignore[attr-defined]
    return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()
