from __future__ import annotations

import pytest
from peers_lib.contestant import ENGINES, Contestant, choose, missing
from peers_lib.install import TORCH, needed


def names(contestants: tuple[Contestant, ...]) -> list[str]:
    return [contestant.name for contestant in contestants]


def test_choosing() -> None:
    assert names(choose("all")) == [f"{engine.name} {dtype}" for engine in ENGINES for dtype in engine.dtypes]
    assert names(choose("vllm:float32, pagehold,vllm")) == ["vllm float32", "pagehold bfloat16", "vllm bfloat16"]
    with pytest.raises(ValueError, match="no engine 'llama': there are all, pagehold"):
        choose("pagehold,llama")


def test_what_is_not_there_says_how_to_get_it() -> None:
    engine = ENGINES[0]
    assert missing(engine) == ""
    absent = type(engine)("x", ".venv-that-is-not", ("x",), ("float32",), False, "", "how")
    assert missing(absent) == "not installed: how"
    other = type(engine)("x", ".venv", ("no-such-distribution",), ("float32",), False, "", "how")
    assert missing(other) == "not installed: how"


def test_requirements_without_what_is_not_needed() -> None:
    listed = ["numpy", 'torch==2.13.0+cpu; platform_machine == "x86_64"', "TorchVision", "torch_x", 'av; extra == "a"']
    assert needed(listed) == ["numpy", "torch_x", TORCH]
