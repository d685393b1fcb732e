"""The words of `<key>.log` that tell how far its outputs are, read without its tokens and without numpy.

For whoever looks at many logs again and again. `layout` has the whole, and the table of what stands where.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LAYOUT_VERSION: Final = 3  # of `tables` as well
LOG_MAGIC: Final = 0x50414745484C4F47  # "PAGEHLOG"
LOG_HEADER_WORDS: Final = 8
OUTPUT_WORDS: Final = 8
FLAG_LOGPROBS: Final = 1
_WORDS: Final = struct.Struct("=8Q")


@dataclass(frozen=True, slots=True)
class OutputWords:
    """One output, as its log has it. In tokens."""

    prompt: int
    cached: int  # of the prompt, that another request had computed
    computed: int
    known: int  # prompt and answer
    ended: bool

    @property
    def generated(self) -> int:
        return self.known - self.prompt


def output_nbytes(capacity: int, logprobs: bool) -> int:
    """Of an output's part of a log. capacity: tokens."""
    column = -(-capacity * 4 // 64) * 64
    return OUTPUT_WORDS * 8 + column * (2 if logprobs else 1)


def read_outputs(path: Path) -> list[OutputWords]:
    """By index. Raises OSError, and ValueError for what is no log of this layout version."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        magic, version, outputs, capacity, prompt, flags, *_ = _read(fd, 0)
        if (magic, version) != (LOG_MAGIC, LAYOUT_VERSION):
            raise ValueError("not a request log of this layout version")
        length = output_nbytes(capacity, bool(flags & FLAG_LOGPROBS))
        if os.fstat(fd).st_size < _WORDS.size + outputs * length:
            raise ValueError("request log is shorter than its header says")
        return [_output(_read(fd, _WORDS.size + index * length), prompt) for index in range(outputs)]
    finally:
        os.close(fd)


def _read(fd: int, offset: int) -> tuple[int, ...]:
    raw = os.pread(fd, _WORDS.size, offset)
    if len(raw) < _WORDS.size:
        raise ValueError("request log is shorter than its header says")
    return _WORDS.unpack(raw)


def _output(words: tuple[int, ...], prompt: int) -> OutputWords:
    progress, terminal, cached, *_ = words
    return OutputWords(prompt, cached, computed=progress & 0xFFFFFFFF, known=progress >> 32, ended=bool(terminal & 1))
