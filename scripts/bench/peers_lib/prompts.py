"""Prompts of real text whose answers are largely in them: copies and small edits of passages of Python's own manual.

The text is `pydoc_data.topics`, which comes with Python; the table of a run names the version.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib import import_module
from typing import Final

from peers_lib.requestfile import Request

# A user's message to prompt tokens, through the model's chat template and tokenizer.
Speak = Callable[[str], list[int]]

_WORDS: Final = 160  # of a passage: somewhat more than the answer has room for, so that it can be copied to the end
_TASKS: Final = (
    "Repeat the following text word for word, without any comment.\n\n{text}",
    "Here is a text, and then the same text again.\n\n{text}\n\n{text}\n\nWrite the text once more, word for word.",
    'Copy the following text, but write "{new}" wherever it says "{old}". Change nothing else.\n\n{text}',
    "{text}\n\nCopy the text above into your answer, word for word, from its first sentence on.",
)


def passages() -> list[str]:
    """All passages, in a fixed order: runs of whole paragraphs of prose."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    found = []
    for name in sorted(topics):
        kept: list[str] = []
        for paragraph in topics[name].split("\n\n"):
            kept += paragraph.split()
            if len(kept) >= _WORDS:
                found.append(" ".join(kept[:_WORDS]))
                kept = []
    return found


def ask(passage: str, task: int) -> str:
    """The passage with one of the tasks; the edit exchanges a word that the passage has often."""
    words = [word for word in passage.split() if word.isalpha() and len(word) > 3]
    old = max(dict.fromkeys(words), key=words.count, default="the")
    return _TASKS[task % len(_TASKS)].format(text=passage, old=old, new="widget")


def copies(seed: int, count: int, max_tokens: int, prefix: str, speak: Speak) -> list[Request]:
    """`count` requests, no passage twice, the tasks in turn."""
    source = random.Random(seed)
    found = []
    for number, passage in enumerate(source.sample(passages(), count)):
        ids = tuple(speak(ask(passage, number)))
        found.append(Request(f"{prefix}-{number}", ids, max_tokens, True, source.getrandbits(32)))
    return found
