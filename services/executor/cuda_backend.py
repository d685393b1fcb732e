"""The model on a GPU: pages in device memory that the manager exports, opened by `DevicePool`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from ctypes import CDLL
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from kernels.cuda.device import CompilationError
from kernels.cuda.gpu import CacheError
from kvmanager.device.memory import DeviceError, load_driver
from kvmanager.errors import Refused
from kvmanager.geometry import asked_geometry, asked_place, difference, read_fingerprint, read_geometry, read_place
from kvmanager.layout import HEADER_WORDS, LAYER_MAJOR, KvDtype, PoolKind
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.settings import ExecutorSettings
from pagehold.runtime.statedir import StateDir
from services.executor.backend import Backend, ConfigurationError, PoolGone
from services.executor.devicepool import DevicePool
from services.executor.inbox import Inbox, PoolLost
from services.executor.modelstore.packed import PackedModel
from services.executor.shared import SharedPool

if TYPE_CHECKING:
    from services.executor.runner.cuda.platform import Platform

GPU_BATCH_TOKENS: Final = 2048
_DRIVER: Final = "libcuda.so.1"
_DRIVER_FILES: Final = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # the latter in WSL
_INSTALL: Final = "install Pagehold with its extra, as in `pip install 'pagehold[cuda13]'`, or use --device cpu"


def is_there() -> bool:
    """Whether `--device auto` takes a GPU: there is a driver, and what drives it is installed."""
    return any(file.exists() for file in _DRIVER_FILES) and _is_installed()


class CudaBackend(Backend):
    device = "cuda"

    def __init__(
        self,
        settings: ExecutorSettings,
        model: PackedModel,
        max_model_len: int,
        state: StateDir,
        pool: SharedPool,
        inbox: Inbox,
    ) -> None:
        """Loads the weights onto the device. Raises ConfigurationError."""
        try:
            from services.executor.runner.cuda.limits import Limits
            from services.executor.runner.cuda.runner import CudaRunner
        except ImportError as error:  # a CPU's installation has no torch
            raise ConfigurationError(f"--device cuda needs torch and CuPy; {_INSTALL}") from error
        dtype = settings.dtype
        kv_dtype = settings.kv_dtype or dtype
        if dtype == "float32" or kv_dtype not in (dtype, "fp8_e4m3"):
            raise ConfigurationError(
                f"a GPU computes in bfloat16 or float16, over pages of the same type or fp8_e4m3, "
                f"not in {dtype} over {kv_dtype}; choose other --dtype and --kv-dtype"
            )
        self._settings, self._model, self._state, self._pool, self._inbox = settings, model, state, pool, inbox
        self.max_batch_tokens = settings.max_batch_tokens or GPU_BATCH_TOKENS
        self._kind = PoolKind[settings.pool.upper()]
        limits = Limits(settings.page_size, max_model_len, settings.max_num_seqs, self.max_batch_tokens)
        try:
            platform = _platform(settings)
            _check_room(model, platform)
            # The runner first: the importer opens what it is given in the context that torch has made.
            self.runner: CudaRunner = CudaRunner(model, platform, limits, dtype, kv_dtype, settings.deterministic)
            importer = load_driver(settings.cuda_driver).importer(self._kind)
            self._uuid = importer.device(0)
            self._memory = DevicePool(state, pool, importer, self._kind, self._uuid, self._let_go)
        except (CacheError, CompilationError, DeviceError, ValueError) as error:
            raise ConfigurationError(str(error)) from error

    def describe(self, request: kv.AttachRequest) -> None:
        spec = self._model.spec
        request.geometry.layout_id = LAYER_MAJOR
        request.device.MergeFrom(kv.Device(kind=kv.PoolKind.Name(self._kind), uuid=self._uuid, pid=os.getpid()))
        if request.geometry.kv_dtype == KvDtype.FP8_E4M3.name.lower():
            request.scales.extend([1.0] * (spec.layers * 2 * spec.kv_heads))

    def pool_bytes(self, request: kv.AttachRequest) -> int:
        wanted = self._settings.kv_memory or usable_pool_bytes(self._state, request)
        if not wanted:
            wanted = self.runner.pool_bytes(self._settings.memory_fraction)
        if wanted <= 0:
            raise ConfigurationError(
                "the model leaves no memory of the device for pages; raise --memory-fraction, or lower "
                "--max-batch-tokens or --max-num-seqs"
            )
        return wanted

    async def prepared(self, request: kv.AttachRequest) -> kv.AttachRequest:
        try:
            return await self._memory.prepared(request)
        except DeviceError as error:
            raise ConfigurationError(str(error)) from error

    async def _let_go(self) -> None:
        """Until the step thread has stopped using the pool."""
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def let_go() -> None:
            loop.call_soon_threadsafe(done.set)

        self._inbox.put(PoolLost(let_go))
        await done.wait()

    def attached(self, response: kv.AttachResponse) -> Callable[[], None]:
        pool = self._pool
        if not pool.mapped:
            pool.map_tables()
        elif not pool.still_the_same():
            raise PoolGone("the manager has other tables now; starting again")
        try:
            mapping = self._memory.opened(response.export)
        except (DeviceError, OSError) as error:
            raise ConfigurationError(f"cannot open the page pool: {error}") from error

        def map_pool() -> None:
            if mapping is not None:
                strides, scales = pool.geometry.strides, pool.scales.reshape(-1)
                self.runner.map_pool(mapping, pool.pages, pool.page_size, strides, scales)

        return map_pool

    def close(self) -> None:
        self.runner.close()
        self._memory.close()


def _check_room(model: PackedModel, platform: Platform) -> None:
    """Raises ConfigurationError where the weights do not fit beside what is on the device already."""
    weights, free = sum(tensor.nbytes for tensor in model.tensors.values()), platform.memory().free
    if weights > free:
        raise ConfigurationError(
            f"the weights take {weights / 2**30:.2f} GiB and the device has {free / 2**30:.2f} GiB left, "
            f"{(weights - free) / 2**30:.2f} GiB too little; choose a smaller --kv-memory or --memory-fraction for the "
            "pool that is there (`pagehold up --discard` drops it), or stop what else uses the device"
        )


def usable_pool_bytes(state: StateDir, request: kv.AttachRequest) -> int:
    """Of the pool that the manager has, if this executor can use it: then it need not be measured. Else 0."""
    try:
        header = np.fromfile(state.tables, np.uint64, HEADER_WORDS)
        there = read_geometry(header)
        different = difference(
            there,
            read_fingerprint(header),
            asked_geometry(request),
            request.fingerprint,
            read_place(header),
            asked_place(request),
        )
    except (OSError, ValueError, IndexError, Refused):
        return 0
    return 0 if different else there.pages * there.page_bytes


def require_gpu(settings: ExecutorSettings) -> None:
    """Puts nothing on it. Raises ConfigurationError where there is none, or nothing that drives it."""
    if settings.cuda_driver:
        return
    if not _is_installed():
        raise ConfigurationError(f"--device cuda needs torch and CuPy; {_INSTALL}")
    # Before torch is loaded, which takes seconds each time that this process is started again.
    if not _has_driver():
        raise ConfigurationError(
            f"no NVIDIA driver: {_DRIVER} cannot be loaded here; hand a GPU on, or use --device cpu"
        )
    import torch

    if not torch.cuda.is_available():
        raise ConfigurationError(f"torch sees no GPU, or is no build for CUDA; {_INSTALL}")


def _is_installed() -> bool:
    return all(find_spec(name) for name in ("torch", "cupy"))


def _has_driver() -> bool:
    try:
        CDLL(_DRIVER)
    except OSError:
        return False
    return True


def _platform(settings: ExecutorSettings) -> Platform:
    """Raises ConfigurationError where there is no GPU to be used."""
    require_gpu(settings)
    if settings.cuda_driver:
        stand_in: Platform = import_module(settings.cuda_driver).make_platform()
        return stand_in
    from services.executor.runner.cuda.gpu_platform import GpuPlatform

    return GpuPlatform(0)
