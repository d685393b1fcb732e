"""What only a GPU shows of `GpuDevice`: streams, graphs, shared memory, compilation."""

from __future__ import annotations

import pytest
import torch

from kernels.cuda.device import CompilationError, Device, Grid
from kernels.cuda.gemm import FixedGemm
from kernels.cuda.norm import Norms

HIDDEN = 4096
ROWS = 64


@pytest.fixture(scope="module")
def device() -> Device:
    from kernels.cuda.gpu import GpuDevice

    return GpuDevice(0)


class Norm:
    """RMSNorm of one input into one output."""

    def __init__(self, device: Device) -> None:
        self.norms = Norms(device, HIDDEN, "bfloat16", 1e-5)
        self.x, self.out = (torch.zeros(ROWS, HIDDEN, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        self.weight = torch.ones(HIDDEN, device="cuda")

    def launch(self) -> None:
        self.norms.rms_norm(self.x.data_ptr(), self.weight.data_ptr(), self.out.data_ptr(), ROWS)

    def check(self) -> None:
        torch.cuda.synchronize()
        wide = self.x.double()
        wanted = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(self.out.double(), wanted, rtol=2e-2, atol=2e-2)


def fresh(seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(ROWS, HIDDEN, generator=generator, device="cuda").bfloat16()


def test_a_launch_waits_for_torchs_work_on_its_stream(device: Device) -> None:
    norm, stream = Norm(device), torch.cuda.Stream()
    norm.launch()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        norm.x.copy_(fresh(1), non_blocking=True)
        norm.launch()
    norm.check()


def test_a_graph_replays_on_changed_inputs(device: Device) -> None:
    norm, graph = Norm(device), torch.cuda.CUDAGraph()
    norm.launch()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        norm.launch()
    for seed in (1, 2):
        norm.x.copy_(fresh(seed))
        norm.out.fill_(torch.nan)
        graph.replay()
        norm.check()


def test_more_shared_memory_than_the_usual_limit(device: Device) -> None:
    """Every tile of the GEMM takes about 96 KiB."""
    gemm = FixedGemm(device, "bfloat16")
    weight = torch.randn(384, 512, device="cuda").bfloat16()
    for m in (5, 200):
        a = torch.randn(m, 512, device="cuda").bfloat16()
        out = torch.full((m, 384), torch.nan, dtype=torch.bfloat16, device="cuda")
        gemm.launch(a=a.data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(), m=m, n=384, k=512)
        torch.cuda.synchronize()
        torch.testing.assert_close(out.float(), a.float() @ weight.float().T, rtol=2e-2, atol=0.5)


def test_an_empty_grid_launches_nothing(device: Device) -> None:
    norm = Norm(device)
    norm.out.fill_(7)
    norm.norms.rms_norm(norm.x.data_ptr(), norm.weight.data_ptr(), norm.out.data_ptr(), 0)
    torch.cuda.synchronize()
    assert (norm.out == 7).all()


def test_the_occupancy_is_the_drivers(device: Device) -> None:
    kernel = device.kernel("norm.cu", "rms_norm", {"HIDDEN": HIDDEN, "THREADS": 512, "WIDTH": 8}, 512)
    assert 1 <= kernel.blocks_per_multiprocessor <= 4, "of 512 threads no more fit"
    kernel.launch(Grid(0), ())


def test_a_kernel_that_does_not_compile_says_why(device: Device) -> None:
    with pytest.raises(CompilationError, match="no_such_type"):
        device.kernel("norm.cu", "rms_norm", {"DTYPE": "no_such_type"}, 512)
