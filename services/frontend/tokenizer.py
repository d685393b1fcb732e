"""Text to tokens: the `tokenizers` library and a sandboxed chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

import grpc
import structlog
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.v1 import inference_pb2 as api
from services.frontend.errors import RequestError, invalid

log = structlog.get_logger()


class TemplateRefusal(Exception):
    """The chat template itself refused the messages; its text is meant for the caller."""


class ModelTokenizer:
    """The tokenizer and template of one model, as the executor describes it."""

    def __init__(self, described: ex.DescribeResponse) -> None:
        self._tokenizer = Tokenizer.from_buffer(described.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bos = [described.bos_token_id] if described.add_bos_token else []
        self._special = dict(described.special_tokens)
        self._template = _compile(described.chat_template) if described.chat_template else None
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, one in added.items() if one.special)
        # No token is longer: a bound on how much text can fit a context.
        self.longest_token = max((len(token) for token in self._tokenizer.get_vocab()), default=1)

    @property
    def has_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Text as it is, with the model's leading special tokens."""
        return self._bos + list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_chat(self, text: str) -> list[int]:
        """What `render` made: templates write their own special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def render(self, messages: Sequence[api.ChatMessage]) -> str:
        """Raises RequestError when there is no template or it refuses the messages."""
        if self._template is None:
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "NO_CHAT_TEMPLATE",
                "the model has no usable chat template; send text",
            )
        listed = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=listed, add_generation_prompt=True, **self._special)
        except TemplateRefusal as refusal:
            raise invalid("chat", f"the chat template refuses the messages: {refusal}") from refusal
        except Exception as error:  # the template is the model's, so it can raise anything
            raise invalid("chat", "the chat template cannot render these messages; check roles and order") from error

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def _compile(source: str) -> Template | None:
    """As transformers does, so that models' templates find what they expect. None: it is no template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        log.warning("the model's chat template does not compile; chat is refused", reason=str(error))
        return None


def _refuse(message: Any) -> NoReturn:
    raise TemplateRefusal(str(message)[:200])
