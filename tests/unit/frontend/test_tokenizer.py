"""Text to tokens, and chat templates, which come with models from anywhere."""

from __future__ import annotations

import grpc
import pytest

from pagehold.v1 import inference_pb2 as api
from services.frontend.errors import RequestError
from services.frontend.tokenizer import ModelTokenizer
from tests.unit.frontend.world import SPECIAL, byte_level, described

CHAT = [api.ChatMessage(role="user", content="hi")]


def with_template(source: str) -> ModelTokenizer:
    return ModelTokenizer(described(chat_template=source, special_tokens={"eos_token": "<|im_end|>"}))


def test_round_trip() -> None:
    tokenizer = ModelTokenizer(described())
    text = "the bin 😀 €\n\ttabs"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_leading_token_is_for_plain_text_only() -> None:
    tokenizer = ModelTokenizer(described(add_bos_token=True, bos_token_id=1))
    assert tokenizer.encode("a")[0] == 1
    assert tokenizer.encode_chat("a") == tokenizer.encode("a")[1:]


def test_special_tokens_are_tokens_but_no_text() -> None:
    tokenizer = ModelTokenizer(described())
    assert tokenizer.special_ids == frozenset(range(len(SPECIAL)))
    assert tokenizer.encode("<|im_end|>a<|im_start|>")[::2] == [2, 1]
    assert tokenizer.decode([2, *tokenizer.encode("a"), 1]) == "a"


def test_nothing_is_longer_than_the_longest_token() -> None:
    assert ModelTokenizer(described()).longest_token == max(len(name) for name in byte_level().get_vocab())


def test_a_template_is_rendered_as_transformers_does() -> None:
    tokenizer = with_template(
        "{%- for message in messages %}\n"
        "  {%- if loop.index > 1 %}{% break %}{% endif %}\n"
        "  {{- message['role'] | upper }}: {{ message.content | tojson }}{{ eos_token }}\n"
        "{%- endfor %}{% if add_generation_prompt %}>{% endif %}{{ strftime_now('%Y') | length }}"
    )
    assert tokenizer.render([api.ChatMessage(role="user", content='é"'), *CHAT]) == 'USER: "é\\""<|im_end|>>4'


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].__class__.__base__ }}",
        "{{ messages.__init__.__globals__['sys'] }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__.datetime }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ ('%s' | attr('__mod__')).__self__ }}",
        "{{ (messages | map(attribute='__class__') | list)[0].__name__ }}",
        "{% set x = messages.append(1) %}{{ messages | length }}",
        "{% for m in messages %}{% set _ = m.update({'role': 'x'}) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ range(10000000) | list }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].nothing.more }}",
    ],
)
def test_a_hostile_template_gets_nowhere(attack: str) -> None:
    tokenizer = with_template(attack)
    with pytest.raises(RequestError) as caught:
        tokenizer.render(CHAT)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.message == "chat: the chat template cannot render these messages; check roles and order"


def test_a_template_may_refuse_in_its_own_words() -> None:
    tokenizer = with_template("{{ raise_exception('Roles must alternate ' + 'x' * 1000) }}")
    with pytest.raises(RequestError, match="Roles must alternate") as caught:
        tokenizer.render(CHAT)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("source", ["", "{% for m in"])
def test_no_usable_template_is_no_reason_not_to_serve(source: str) -> None:
    tokenizer = with_template(source)
    assert not tokenizer.has_template
    with pytest.raises(RequestError, match="no usable chat template; send text") as caught:
        tokenizer.render(CHAT)
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
