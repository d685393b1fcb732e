"""A tokenizer of one letter a token."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models

from tests.faults.simulator.messages.requests import SHAPE


def _make() -> bytes:
    vocabulary = {string.ascii_letters[number]: number for number in range(SHAPE.vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer.to_str().encode()


TOKENIZER_JSON = _make()
