"""What is compiled without a GPU: the builds that the kernel modules themselves ask a device for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from kernels.cuda.activation import SiluMul
from kernels.cuda.attention import AttentionShape, Kind, PagedAttention
from kernels.cuda.device import Argument, Device, Grid, Kernel
from kernels.cuda.elements import Dtype, KvDtype
from kernels.cuda.gemm import FixedGemm
from kernels.cuda.norm import Norms
from kernels.cuda.pages import PageCopy, PageLayout
from kernels.cuda.rope import RopeAppend
from kernels.cuda.sampling import Sampler

ARCHITECTURES: Final = (80, 90, 100)


class Build(NamedTuple):
    """One kernel as it is asked for. arch: 90 for sm_90."""

    arch: int
    file: str
    name: str
    defines: tuple[tuple[str, int | str], ...]
    threads: int
    shared_bytes: int

    def __str__(self) -> str:
        macros = " ".join(f"{macro}={value}" for macro, value in self.defines)
        return f"{self.name} of {self.file} for sm_{self.arch} with {macros or 'the defaults'}"


class Recorder(Device):
    """A device that notes what it should compile."""

    def __init__(self, arch: int) -> None:
        self.multiprocessors = 132
        self.compute_capability = arch
        self.builds: list[Build] = []

    def kernel(
        self, file: str, name: str, defines: Mapping[str, int | str], threads: int, shared_bytes: int = 0
    ) -> Kernel:
        self.builds.append(
            Build(self.compute_capability, file, name, tuple(sorted(defines.items())), threads, shared_bytes)
        )
        return _Nothing()


class _Nothing(Kernel):
    @property
    def blocks_per_multiprocessor(self) -> int:
        return 1

    def launch(self, grid: Grid, arguments: tuple[Argument, ...]) -> None:
        raise AssertionError("a recorded kernel was launched")


Maker = Callable[[Device], object]


def recorded(makers: Iterable[Maker], arch: int) -> list[Build]:
    recorder = Recorder(arch)
    for make in makers:
        make(recorder)
    return recorder.builds


def attention(
    kind: Kind,
    head_dim: int,
    dtype: Dtype = "bfloat16",
    kv_dtype: KvDtype | None = None,
    group: int = 4,
    **options: Any,
) -> Maker:
    page_size = options.pop("page_size", 16)
    shape = AttentionShape(8 * group, 8, head_dim, page_size, dtype, kv_dtype or dtype, **options)
    return lambda device: PagedAttention(device, shape, kind)


FP8: Final[KvDtype] = "fp8_e4m3"
EVERYTHING: Final = {"window": 1024, "softcap": 30.0, "alibi": True}

DECODE: Final = (
    *(attention("decode", head_dim) for head_dim in (64, 80, 96, 128, 256)),
    *(attention("decode", head_dim, kv_dtype=FP8) for head_dim in (64, 80, 128, 256)),
    attention("decode", 128, "float16", group=8, page_size=64),
    attention("decode", 128, group=32),
    attention("decode", 128, **EVERYTHING),
)
APPEND: Final = (
    *(attention("append", head_dim) for head_dim in (64, 80, 96, 128, 256)),
    attention("append", 128, kv_dtype=FP8),
    attention("append", 128, "float16", **EVERYTHING),
)
OTHERS: Final[tuple[Maker, ...]] = (
    lambda device: FixedGemm(device, "bfloat16"),
    lambda device: Sampler(device, 128_256, "float32"),
    lambda device: Norms(device, 4096, "bfloat16", 1e-5),
    lambda device: SiluMul(device, 14_336, "bfloat16"),
    lambda device: RopeAppend(device, 32, 8, 128, 16, "bfloat16", "bfloat16", False, 1e-5),
    lambda device: RopeAppend(device, 32, 8, 128, 16, "bfloat16", FP8, True, 1e-6),
    lambda device: PageCopy(device, PageLayout.page_major(32, 8, 16, 128, 2)),
)
