"""Where the model runs, as the executor's shell sees it: a runner, and the way to its pages.

describe   what an attach says about the pool
pool_bytes how large it should be, if it has to be made
prepared   before each attach: what only now can be said
attached   after each attach: the pool is opened, or still open; the step thread then maps it
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

from kvmanager.layout import IN_WORDS, PAGE_MAJOR
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.memory import default_pool_bytes
from pagehold.runtime.settings import ExecutorSettings
from pagehold.runtime.statedir import StateDir
from services.executor.modelstore.packed import PackedModel
from services.executor.runner.base import Runner
from services.executor.shared import SharedPool

CPU_BATCH_TOKENS: Final = 512


class ConfigurationError(Exception):
    """The settings do not fit the model or the machine; the message says what to do."""


class PoolGone(Exception):
    """What this process maps is no longer what the manager serves: the next one starts afresh."""


class Backend(ABC):
    """All methods are called on the event loop; the runner belongs to the step thread."""

    device: str  # as GetServerInfo says it
    runner: Runner
    max_batch_tokens: int

    @abstractmethod
    def describe(self, request: kv.AttachRequest) -> None:
        """Fills in layout, device and scales of the pool."""

    @abstractmethod
    def pool_bytes(self, request: kv.AttachRequest) -> int:
        """request: as described. Raises ConfigurationError where nothing is left for pages."""

    @abstractmethod
    async def prepared(self, request: kv.AttachRequest) -> kv.AttachRequest:
        """The request as this attach sends it. Raises ConfigurationError."""

    @abstractmethod
    def attached(self, response: kv.AttachResponse) -> Callable[[], None]:
        """Opens what the manager has. Returns what the step thread does before its next step.

        Raises PoolGone, ConfigurationError.
        """

    @abstractmethod
    def close(self) -> None:
        """After the last step."""


class HostBackend(Backend):
    """Pages in shared memory, the model on the CPU."""

    device = "cpu"

    def __init__(self, settings: ExecutorSettings, model: PackedModel, state: StateDir, pool: SharedPool) -> None:
        """Raises ConfigurationError."""
        if wrong := {settings.dtype, settings.kv_dtype} & {"float16", "fp8_e4m3"}:
            raise ConfigurationError(f"{sorted(map(str, wrong))[0]} is for GPUs; use bfloat16 or float32 on a CPU")
        if settings.runner == "reference" and settings.kv_dtype == "int8":
            raise ConfigurationError("the reference runner has no int8 pages; choose another --kv-dtype")
        if settings.runner != "reference" and model.spec.head_dim % 4:
            raise ConfigurationError(
                f"the kernels for CPUs take heads of a multiple of 4 numbers, this model has {model.spec.head_dim}"
            )
        self._settings, self._state, self._pool = settings, state, pool
        self.max_batch_tokens = settings.max_batch_tokens or CPU_BATCH_TOKENS
        self.runner = _make_runner(settings, model)

    def describe(self, request: kv.AttachRequest) -> None:
        request.geometry.layout_id = PAGE_MAJOR if self._settings.runner == "reference" else IN_WORDS

    def pool_bytes(self, request: kv.AttachRequest) -> int:
        return self._settings.kv_memory or default_pool_bytes(self._state.root, self._settings.memory_fraction)

    async def prepared(self, request: kv.AttachRequest) -> kv.AttachRequest:
        return request

    def attached(self, response: kv.AttachResponse) -> Callable[[], None]:
        pool = self._pool
        if not pool.mapped:
            self.runner.map_pool(pool.map(), pool.pages, pool.page_size)
        elif not pool.still_the_same():
            # The manager started afresh: every page and log that this process maps is gone.
            raise PoolGone("the manager has another pool now; starting again")
        return _nothing

    def close(self) -> None:
        self.runner.close()


def _nothing() -> None: ...


def _make_runner(settings: ExecutorSettings, model: PackedModel) -> Runner:
    """Imports only the one that is used."""
    kv_dtype = settings.kv_dtype or settings.dtype
    if settings.runner == "reference":
        from services.executor.runner.reference import ReferenceRunner

        return ReferenceRunner(model, settings.dtype, kv_dtype)
    from services.executor.runner.cpu import CpuRunner

    threads = settings.threads or len(os.sched_getaffinity(0))
    return CpuRunner(model, settings.dtype, kv_dtype, threads, settings.cpu_isa)
