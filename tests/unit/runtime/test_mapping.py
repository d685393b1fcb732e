"""Files mapped without a descriptor."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from pagehold.runtime.mapping import map_shared


def mappings(path: Path) -> int:
    return sum(line.endswith(str(path)) for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_mapping_takes_no_descriptor_and_goes_with_its_last_view(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    gc.collect()  # what other tests have left would be closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    views = [map_shared(path, writable=True) for _ in range(100)]
    assert len(os.listdir("/proc/self/fd")) <= before
    assert mappings(path) > 0
    words = np.frombuffer(views[0], np.uint64)
    words[1] = 7
    assert path.read_bytes()[8] == 7
    del views
    gc.collect()
    assert mappings(path) == 1
    assert words[1] == 7
    del words
    gc.collect()
    assert mappings(path) == 0


def test_what_is_mapped_to_be_read_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    view = map_shared(path, writable=False)
    assert bytes(view) == b"abc" and view.readonly
    with pytest.raises(TypeError):
        view[0] = 1


def test_an_empty_file_and_none_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        map_shared(tmp_path / "empty", writable=False)
    with pytest.raises(FileNotFoundError):
        map_shared(tmp_path / "none", writable=False)
