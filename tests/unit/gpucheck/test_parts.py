"""The parts' own logic, and one of them whole on the stand-in for a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu.job import REPOSITORY, Job, Options
from gpu.model import LLAMA_3_8B, TINY, make_packed, tensors_of, total_bytes, weight_bytes
from gpu.parts import decode, kernels, sanitizer
from gpu.parts.engine import Load, bound
from gpu.peers import Case, Peer, call_by_name, peer_seconds
from gpu.pool import Pool, Shape, expected, pages_and_layers
from gpu.report import decode as result_of

from kernels.cpu.packing import pack_gate_up, pack_linear
from services.executor.modelstore.packed import TensorKind


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def job(lines: list[str]) -> Job:
    return Job(Options(device="host", work=REPOSITORY / "build" / "host-kernels"), lines.append)


def test_decode_on_the_stand_in(job: Job, lines: list[str]) -> None:
    decode.run(job)
    found = [result_of(line) for line in lines if "note" not in json.loads(line)]
    rows = [one for one in found if one.table == "decode"]
    assert [one.labels[:2] for one in rows] == [
        (cache, layout) for layout in ("layer-major", "page-major") for cache in ("bfloat16", "fp8")
    ]
    for one in rows:
        error = one.figures["error"]
        assert isinstance(error, float) and error < 0.01
        assert one.figures["aim"] in ("met", "missed") and one.figures["of_read"]


@pytest.mark.parametrize("layout", ["page-major", "layer-major"])
def test_layouts_hold_the_same_pages(job: Job, layout: str) -> None:
    shape = Shape(kv_heads=2, page_size=8, head_dim=16)
    pool = Pool(job.bed, shape, pages=3, layers=2, layout=layout)
    sizes = (3, 2, 2, 2, 8, 16) if layout == "page-major" else (2, 3, 2, 2, 8, 16)
    whole = pool.memory.view(torch.bfloat16).view(sizes)
    whole = whole if layout == "page-major" else whole.transpose(0, 1)
    for layer in range(2):
        keys, values = pool.keys_values(layer)
        assert torch.equal(keys, whole[:, layer, 0].transpose(1, 2))
        assert torch.equal(values, whole[:, layer, 1].transpose(1, 2))
        peer_keys, _ = pool.peer_keys_values(layer)
        assert torch.equal(peer_keys.flatten(1), whole[:, layer, 0].flatten(1))
        assert pool.address(layer) == keys.data_ptr()


def test_tables_are_spread_and_have_no_page_twice(job: Job) -> None:
    pool = Pool(job.bed, Shape(kv_heads=1, page_size=8, head_dim=16), 64, 1, "page-major")
    tables = pool.tables(np.array([9, 64]))
    used = [*tables[0, :2], *tables[1]]
    assert len(set(used)) == 10 and max(used) > 32 and tables.shape == (2, 8)


def test_a_pool_has_as_many_layers_as_fit(job: Job) -> None:
    page = 2 * Shape().half_bytes
    assert pages_and_layers(job.bed, Shape(), 10, 400 * page) == (12, 32)
    assert pages_and_layers(job.bed, Shape(), 100, 250 * page) == (125, 2)
    with pytest.raises(ValueError, match="do not fit"):
        pages_and_layers(job.bed, Shape(), 300, 250 * page)


class Torch(Peer):
    """Attention by the definition; `wrong`: of the wrong scale."""

    name = "torch"

    def __init__(self, wrong: bool = False) -> None:
        self.factor = 3.0 if wrong else 1.0

    def prepare(self, case: Case, pool: Pool) -> None: ...

    def run(self, prepared: None, case: Case, pool: Pool, layer: int) -> torch.Tensor:
        keys_values = pool.peer_keys_values(layer)
        found = [
            expected(case.queries[i : i + 1] * self.factor, *keys_values, case.tables[i], int(context))
            for i, context in enumerate(case.contexts)
        ]
        return torch.cat(found)


def test_a_peer_that_is_called_wrongly_is_no_peer(job: Job, lines: list[str]) -> None:
    shape = Shape(kv_heads=2, page_size=8, head_dim=16)
    pool = Pool(job.bed, shape, 8, 1, "layer-major")
    contexts = np.array([20, 9])
    case = Case(torch.randn(2, 4, 16).bfloat16(), pool.tables(contexts), contexts, np.ones(2, np.int64))
    assert peer_seconds(job, Torch(), case, pool, range(1))
    for _ in range(2):
        assert peer_seconds(job, Torch(wrong=True), case, pool, range(1)) is None
    (line,) = lines
    assert "it was called wrongly" in json.loads(line)["note"]


def test_operators_are_called_by_name() -> None:
    library = torch.library.Library("gpucheck", "DEF")
    library.define("attend(Tensor q, Tensor? extra, int splits, float cap=0.0) -> Tensor")
    library.impl("attend", lambda q, extra, splits, cap=0.0: q * splits, "CPU")
    found = call_by_name(torch.ops.gpucheck.attend, {"q": torch.ones(1), "splits": 3, "unknown": 1})
    assert found.item() == 3
    with pytest.raises(ValueError, match="wants splits"):
        call_by_name(torch.ops.gpucheck.attend, {"q": torch.ones(1)})


def test_the_bound_is_weights_and_keys_over_the_copy_rate() -> None:
    assert weight_bytes(LLAMA_3_8B) == pytest.approx(15.0e9, rel=0.01)
    assert bound(Load(), 32, 4.3e12) == pytest.approx(4.6e-3, rel=0.03)


def test_a_random_model_is_laid_out_as_a_converted_one(tmp_path: Path) -> None:
    weights = np.zeros(total_bytes(TINY), np.uint8)
    model = make_packed(TINY, tmp_path, weights, torch.device("cpu"))
    assert model.view("layers.1.mlp_norm").tolist() == [1.0] * TINY.hidden_size
    values = torch.from_numpy(model.view("layers.1.down").view(np.int16)).view(torch.bfloat16)
    assert values.std().item() == pytest.approx(0.02, rel=0.1)


def test_panels_are_as_large_as_a_conversion_makes_them() -> None:
    """Of a layer that is no multiple of a panel."""
    odd = tensors_of(replace(TINY, hidden_size=71, intermediate_size=33))
    half, down = np.zeros((33, 71), np.uint16), np.zeros((71, 33), np.uint16)
    assert odd["layers.0.gate_up"].kind is TensorKind.GATE_UP
    assert odd["layers.0.gate_up"].nbytes == pack_gate_up(half, half).nbytes
    assert odd["layers.0.down"].nbytes == pack_linear(down).nbytes


def test_the_sanitizers_silence_is_no_clean_pass() -> None:
    assert sanitizer.errors("no summary") is None
    text = "========= ERROR SUMMARY: 2 errors\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizer.errors(text) == 2
    assert sanitizer.errors("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n") == 3


def test_kernel_tests_leave_out_those_of_the_stand_in() -> None:
    names = {Path(file).name for file in kernels.kernel_tests()}
    assert "test_norm.py" in names and "test_shim.py" not in names


def test_managed_memory_is_that_of_every_array_and_tensor(tmp_path: Path) -> None:
    """Through a driver made for it, in a process of its own: the allocators stay for good."""
    program = Path(__file__).with_name("managed_program.py")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "driver.so", program.with_name("driver.c")], check=True)
    done = subprocess.run([sys.executable, program, tmp_path], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
