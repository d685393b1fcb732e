"""What the comparison itself needs of the model: its shape, and prompts made of text. From Pagehold's own reader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peers_lib.bound import Shape
from peers_lib.modelfile import ModelFileError
from peers_lib.prompts import Speak


@dataclass(frozen=True, slots=True)
class Model:
    """`path` is as `modelfile.find` gives it."""

    path: Path
    shape: Shape
    speak: Speak | None  # None: it has no chat template


def open_model(path: Path) -> Model:
    """Converts it for Pagehold if that was never done. Raises ModelFileError."""
    from pagehold.executor.v1 import executor_pb2 as ex
    from pagehold.v1 import inference_pb2 as api
    from services.executor.modelstore import store
    from services.frontend.tokenizer import ModelTokenizer

    try:
        packed = store.open_model(str(path))
    except store.ModelError as error:
        raise ModelFileError(str(error)) from error
    spec = packed.spec
    tokenizer = ModelTokenizer(
        ex.DescribeResponse(
            tokenizer_json=packed.tokenizer_json,
            chat_template=packed.chat_template,
            special_tokens=packed.special_tokens,
        )
    )

    def speak(text: str) -> list[int]:
        return tokenizer.encode_chat(tokenizer.render([api.ChatMessage(role="user", content=text)]))

    return Model(
        path=path,
        shape=Shape(
            layers=spec.layers,
            hidden=spec.hidden_size,
            intermediate=spec.intermediate_size,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            vocab=spec.vocab_size,
        ),
        speak=speak if tokenizer.has_template else None,
    )
