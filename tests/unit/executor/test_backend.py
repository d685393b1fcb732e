"""Which device the settings name, and what is refused before anything is loaded onto it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvmanager.layout import IN_WORDS, PAGE_MAJOR
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.settings import ExecutorSettings
from pagehold.runtime.statedir import StateDir
from services.executor import cuda_backend, main
from services.executor.backend import Backend, ConfigurationError, HostBackend
from services.executor.cuda_backend import CudaBackend
from services.executor.inbox import Inbox
from services.executor.main import make_backend, open_weights, wanted_weights
from services.executor.modelstore.packed import PackedModel
from services.executor.modelstore.store import open_model
from services.executor.shared import SharedPool
from tests.models.tiny import Tiny, save_tiny

TINY = Tiny("backend", "mistral", {"hidden_size": 256, "head_dim": 64, "sliding_window": None})
STAND_IN = "tests.device.gpu"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("backend")
    save_tiny(TINY, folder / "model")
    return open_model(str(folder / "model"), folder / "cache", progress=False)


def made(tmp_path: Path, model: PackedModel, **flags: object) -> Backend:
    state = StateDir.prepare(tmp_path / "state")
    settings = ExecutorSettings(state_dir=state.root, **flags)  # type: ignore[arg-type]
    return make_backend(settings, model, 64, state, SharedPool(state), Inbox())


def test_auto_is_the_cpu_where_there_is_no_gpu(tmp_path: Path, model: PackedModel) -> None:
    backend = made(tmp_path, model)
    assert isinstance(backend, HostBackend)
    assert (backend.device, backend.max_batch_tokens) == ("cpu", 512)
    backend.close()


@pytest.mark.parametrize(("runner", "layout"), [("auto", IN_WORDS), ("reference", PAGE_MAJOR)])
def test_the_pool_is_declared_as_the_runner_lays_it_out(
    tmp_path: Path, model: PackedModel, runner: str, layout: int
) -> None:
    backend = made(tmp_path, model, device="cpu", runner=runner, dtype="float32")
    request = kv.AttachRequest()
    backend.describe(request)
    assert request.geometry.layout_id == layout
    backend.close()


def test_heads_that_fill_no_words_are_refused(tmp_path: Path) -> None:
    odd = Tiny("odd", "mistral", {"hidden_size": 72, "head_dim": 18, "sliding_window": None})
    save_tiny(odd, tmp_path / "model")
    model = open_model(str(tmp_path / "model"), tmp_path / "cache", progress=False)
    with pytest.raises(ConfigurationError, match="heads of a multiple of 4 numbers, this model has 18"):
        made(tmp_path, model, device="cpu")
    made(tmp_path, model, device="cpu", runner="reference").close()


@pytest.mark.parametrize("flags", [{"dtype": "float16"}, {"kv_dtype": "fp8_e4m3"}])
def test_types_of_gpus_are_refused_on_a_cpu(tmp_path: Path, model: PackedModel, flags: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="is for GPUs; use bfloat16 or float32 on a CPU"):
        made(tmp_path, model, device="cpu", **flags)


def test_pages_that_a_runner_lacks_are_refused(tmp_path: Path, model: PackedModel) -> None:
    with pytest.raises(ConfigurationError, match="the reference runner has no int8 pages; choose another --kv-dtype"):
        made(tmp_path, model, device="cpu", runner="reference", kv_dtype="int8")


@pytest.mark.parametrize("flags", [{"dtype": "float32"}, {"kv_dtype": "float16"}, {"kv_dtype": "int8"}])
def test_types_of_cpus_are_refused_on_a_gpu(tmp_path: Path, model: PackedModel, flags: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="choose other --dtype and --kv-dtype"):
        made(tmp_path, model, device="cuda", cuda_driver=STAND_IN, **flags)


@pytest.mark.parametrize(
    ("is_installed", "has_driver", "said"),
    [(False, False, "needs torch and CuPy"), (True, False, "no NVIDIA driver"), (True, True, "torch sees no GPU")],
)
def test_a_gpu_that_is_not_there_is_said_to_be_missing(
    tmp_path: Path,
    model: PackedModel,
    monkeypatch: pytest.MonkeyPatch,
    is_installed: bool,
    has_driver: bool,
    said: str,
) -> None:
    monkeypatch.setattr(cuda_backend, "_is_installed", lambda: is_installed)
    monkeypatch.setattr(cuda_backend, "_has_driver", lambda: has_driver)
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append("torch"))
    with pytest.raises(ConfigurationError, match=f"{said}.* use --device cpu"):
        made(tmp_path, model, device="cuda")
    # It takes seconds to load, each time that a container is started again.
    assert bool(asked) == has_driver


def test_a_missing_gpu_is_said_before_a_model_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main.logs, "configure", lambda *_: None)
    monkeypatch.setattr(main, "open_model", lambda *_, **__: pytest.fail("which takes minutes"))
    assert main.main(ExecutorSettings(state_dir=tmp_path / "state", device="cuda")) == main.EXIT_CONFIG
    assert capsys.readouterr().err.count("use --device cpu") == 1


def test_an_installation_for_cpus_says_what_is_missing(
    tmp_path: Path, model: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("services.executor.runner.cuda")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigurationError, match=r"needs torch and CuPy; install .*pagehold\[cuda13\]"):
        made(tmp_path, model, device="cuda")


def test_a_page_size_without_a_kernel_is_refused(tmp_path: Path, model: PackedModel) -> None:
    with pytest.raises(ConfigurationError, match="page"):
        made(tmp_path, model, device="cuda", cuda_driver=STAND_IN, page_size=24)


def test_weights_that_do_not_fit_say_by_how_much(tmp_path: Path, model: PackedModel) -> None:
    name = max(model.tensors, key=lambda name: model.tensors[name].nbytes)
    large = replace(model, tensors={**model.tensors, name: replace(model.tensors[name], nbytes=1 << 40)})
    with pytest.raises(ConfigurationError, match=r"the weights take 1024\.\d\d GiB .* too little"):
        made(tmp_path, large, device="cuda", cuda_driver=STAND_IN)


def test_the_pool_is_asked_for_on_the_device(tmp_path: Path, model: PackedModel) -> None:
    from pagehold.kv.v1 import kv_manager_pb2 as kv

    backend = made(tmp_path, model, device="cuda", cuda_driver=STAND_IN, kv_dtype="fp8_e4m3", pool="vmm")
    assert isinstance(backend, CudaBackend)
    request = kv.AttachRequest(geometry=kv.Geometry(kv_dtype="fp8_e4m3"))
    backend.describe(request)
    assert (request.device.kind, request.geometry.layout_id) == (kv.POOL_KIND_VMM, 2)
    assert list(request.scales) == [1.0] * (model.spec.layers * 2 * model.spec.kv_heads)
    assert backend.pool_bytes(request) > 0
    backend.close()


def test_blocks_are_the_default_where_they_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ("bfloat16", "file")
    for isa, weights in (("portable", both[:1]), ("avx2", both[:1]), ("avx512bf16", both), ("amx", both[1:])):
        assert wanted_weights(ExecutorSettings(device="cpu", cpu_isa=isa)) == weights
        assert wanted_weights(ExecutorSettings(device="cpu", cpu_isa=isa, weights="int8")) == ("int8",)
        assert wanted_weights(ExecutorSettings(device="cpu", cpu_isa=isa, dtype="float32")) == both[:1]
    monkeypatch.setattr(main, "available_isas", lambda: ["portable", "avx2", "avx512bf16", "amx"])
    assert wanted_weights(ExecutorSettings(device="cpu")) == both[1:]


def test_blocks_for_few_tokens_are_opened_where_the_file_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_tiny(TINY, tmp_path / "model")
    wanted = ExecutorSettings(model=str(tmp_path / "model"), device="cpu", cpu_isa="avx512bf16")
    assert open_weights(wanted).compact is None
    monkeypatch.undo()
    model = open_weights(wanted.model_copy(update={"model": None}))
    assert model.compact is not None and model.compact.weights.nbytes < 0.4 * model.weights.nbytes


def test_four_bits_are_multiplied_as_integers_where_tiles_would_not_wait_for_them() -> None:
    for isa, dtype, weights in (
        ("portable", "bfloat16", "int4-integers"),
        ("avx512bf16", "bfloat16", "int4-integers"),
        ("amx", "bfloat16", "int4"),
        ("amx", "float32", "int4-integers"),
    ):
        assert wanted_weights(ExecutorSettings(device="cpu", cpu_isa=isa, dtype=dtype, weights="int4")) == (weights,)  # type: ignore[arg-type]


@pytest.mark.parametrize("flags", [{"device": "cuda"}, {"device": "cpu", "runner": "reference"}])
def test_blocks_are_refused_where_nothing_expands_them(flags: dict[str, str]) -> None:
    assert wanted_weights(ExecutorSettings(**flags)) == ("bfloat16",)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="--weights int4 is for CPUs"):
        wanted_weights(ExecutorSettings(weights="int4", **flags))  # type: ignore[arg-type]
