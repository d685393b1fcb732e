"""A log's progress, read from its file, is what the whole log says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvmanager.layout import Reason, RequestLog
from kvmanager.logwords import read_outputs


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("capacity", [16, 17, 1000])
def test_it_says_what_the_log_says(tmp_path: Path, capacity: int, logprobs: bool) -> None:
    raw = bytearray(RequestLog.nbytes(3, capacity, logprobs))
    log = RequestLog.create(raw, 3, capacity, np.arange(5, 14, dtype=np.uint32), logprobs)
    for output in log.outputs:
        output.tokens[9:] = 0xFFFFFFFF  # whoever takes them for words is found out
    log.outputs[0].set_progress(8, 9)
    log.outputs[1].set_progress(11, 12)
    log.outputs[1].set_cached_tokens(4)
    log.outputs[2].set_progress(15, 16)
    log.outputs[2].set_terminal(Reason.LENGTH, 7)
    path = tmp_path / "a.log"
    path.write_bytes(raw)
    found = read_outputs(path)
    assert [(one.prompt, one.computed, one.known, one.cached, one.ended) for one in found] == [
        (output.prompt_length, output.computed, output.known, output.cached_tokens, output.ended)
        for output in log.outputs
    ]
    assert [one.generated for one in found] == [0, 3, 7]


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    raw = bytearray(RequestLog.nbytes(2, 16, False))
    RequestLog.create(raw, 2, 16, np.zeros(3, np.uint32), False)
    path = tmp_path / "a.log"
    for wrong in (b"", raw[:40], raw[:-1], b"\1" + raw[1:], raw[:8] + b"\xff" + raw[9:], raw[:16] + b"\xff" * 8):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="request log"):
            read_outputs(path)
    with pytest.raises(FileNotFoundError):
        read_outputs(tmp_path / "b.log")
