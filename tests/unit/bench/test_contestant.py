from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from peers_lib.contestant import BENCH, ENGINES, REPOSITORY, Contestant, choose, environment, missing
from peers_lib.install import TORCH, install, llama_cpp_arguments, needed


def names(contestants: tuple[Contestant, ...]) -> list[str]:
    return [contestant.name for contestant in contestants]


def test_choosing() -> None:
    assert names(choose("all")) == [f"{engine.name} {dtype}" for engine in ENGINES for dtype in engine.usual]
    assert names(choose("vllm:float32, pagehold,vllm")) == ["vllm float32", "pagehold bfloat16", "vllm bfloat16"]
    with pytest.raises(ValueError, match="no engine 'llama': there are all, pagehold"):
        choose("pagehold,llama")


def test_a_variant_is_a_dtype_and_flags() -> None:
    (plain,) = choose("pagehold")
    (int8,) = choose("pagehold:weights=int8+kv-dtype=int8")
    assert (int8.name, int8.flags) == (
        "pagehold bfloat16 weights=int8 kv-dtype=int8",
        ("weights=int8", "kv-dtype=int8"),
    )
    assert int8 != plain
    assert choose("pagehold:float32+speculation=off")[0].dtype == "float32"
    assert names(choose("llama.cpp:prefix-cache")) == [
        f"llama.cpp Q{file} prefix-cache" for file in ("4_0", "4_1", "8_0")
    ]
    assert names(choose("llama.cpp:BF16")) == ["llama.cpp BF16"]


@pytest.mark.parametrize("text", ["vllm:int8", "vllm:float32+bfloat16", "pagehold:", "transformers:prefix-cache"])
def test_no_variant(text: str) -> None:
    with pytest.raises(ValueError, match=rf"'{re.escape(text)}' is no \w+: want one dtype at most"):
        choose(text)


def test_every_engine_has_a_worker() -> None:
    for engine in ENGINES:
        assert (BENCH / f"{engine.module.replace('.', '/')}.py").exists()
        assert set(engine.usual) <= set(engine.dtypes)


def test_peers_do_not_see_our_packages(tmp_path: Path) -> None:
    seen = {engine.name: environment(engine, tmp_path)["PYTHONPATH"] for engine in ENGINES}
    assert seen.pop("pagehold") == f"{BENCH}:{REPOSITORY}"
    assert set(seen.values()) == {str(BENCH)}


def test_what_is_not_there_says_how_to_get_it() -> None:
    engine = ENGINES[0]
    assert missing(engine) == ""
    absent = replace(engine, venv=".venv-that-is-not", how_to_install="how")
    assert missing(absent) == "not installed: how"
    other = replace(engine, packages=("no-such-distribution",), how_to_install="how")
    assert missing(other) == "not installed: how"


def test_requirements_without_what_is_not_needed() -> None:
    listed = ["numpy", 'torch==2.13.0+cpu; platform_machine == "x86_64"', "TorchVision", "torch_x", 'av; extra == "a"']
    assert needed(listed) == ["numpy", "torch_x", TORCH]


def test_llama_cpp_is_built_for_amx_and_fetches_nothing() -> None:
    arguments = llama_cpp_arguments()
    assert "-DCMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse" in arguments
    assert "-DLLAMA_USE_PREBUILT_UI=OFF" in arguments


def test_what_cannot_be_installed() -> None:
    with pytest.raises(ValueError, match=r"'pagehold' cannot be installed; .*: vllm, llama\.cpp, plots"):
        install("pagehold")
