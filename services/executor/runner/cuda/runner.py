"""The runner for GPUs: plans a step on the host, copies its integers once, replays a graph or launches the kernels.

    submit   chunks ─ batch ─ plan ─▶ pinned ─copy─▶ device ─▶ kernels ─copy─▶ pinned, event
    collect                                                                    wait for the event, read

A step that follows may be submitted before its predecessor is collected: input tokens are read from the history on
the device, where the predecessor's sampler puts them.

A fault of the device is raised by whatever call meets it and never caught here: the process ends, and the next one
goes on from the logs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from kernels.cuda.elements import Dtype, KvDtype
from kernels.cuda.pages import PageCopy
from kvmanager.layout import F32, Strides
from services.executor.modelstore.packed import PackedModel
from services.executor.runner.base import Chunk, Lane, Runner, StepResult
from services.executor.runner.cuda.attention import Attention
from services.executor.runner.cuda.batch import Batch
from services.executor.runner.cuda.decoder import Decoder
from services.executor.runner.cuda.graphs import Graphs, graph_sizes, lane_on_page_0
from services.executor.runner.cuda.lanes import Lanes
from services.executor.runner.cuda.limits import Limits
from services.executor.runner.cuda.platform import Platform
from services.executor.runner.cuda.pool import DeviceMemory, Pool, PoolMemory, make_pool, page_layout, page_major
from services.executor.runner.cuda.products import FixedProducts, TorchProducts
from services.executor.runner.cuda.staging import Slot
from services.executor.runner.cuda.steps import Steps
from services.executor.runner.cuda.uploads import Uploads
from services.executor.runner.cuda.weights import Weights, load_weights


class Flight(NamedTuple):
    """A step under way."""

    slot: Slot
    batch: Batch


class CudaRunner(Runner):
    """dtype: of the arithmetic. kv_dtype: of the pages. deterministic: a position's logits and K/V have the same
    bits whatever its batch, its chunk and the time; slower."""

    depth = 1

    def __init__(
        self,
        model: PackedModel,
        platform: Platform,
        limits: Limits,
        dtype: Dtype,
        kv_dtype: KvDtype,
        deterministic: bool = False,
        graphs: tuple[int, ...] | None = None,
    ) -> None:
        """graphs: padded numbers of decodes that have a graph, ascending; None: `graph_sizes`."""
        self.deterministic = deterministic
        self._platform, self._limits, self._kv_dtype = platform, limits, kv_dtype
        self._spec = model.spec
        with platform.stream():
            weights = load_weights(model, dtype, platform)
            self._lanes = Lanes(platform, limits.max_lanes, limits.max_model_len)
            self._attention = Attention(platform, model.spec, limits, dtype, kv_dtype, deterministic)
            self.steps = Steps(platform, self._attention, limits, self._lanes.stride)
            self._decoder = self._make_decoder(weights, dtype)
            self._uploads = Uploads(platform, 4096)
            self._pairs = torch.zeros(4, dtype=torch.int32, device=platform.torch_device)
            platform.synchronize()
        sizes = graph_sizes(min(limits.max_decodes, platform.most_graph_decodes)) if graphs is None else graphs
        self._graphs = Graphs(sizes, self._attention.shares_prefixes)
        self._pool: Pool | None = None
        self._copy: PageCopy | None = None

    def _make_decoder(self, weights: Weights, dtype: Dtype) -> Decoder:
        platform, limits = self._platform, self._limits
        return Decoder(
            platform,
            self._spec,
            weights,
            self._lanes,
            self._attention,
            FixedProducts(platform.device, dtype) if self.deterministic else TorchProducts(),
            dtype=dtype,
            kv_dtype=self._kv_dtype,
            page_size=limits.page_size,
            max_tokens=limits.max_batch_tokens,
            max_rows=limits.max_rows,
        )

    def map_pool(
        self,
        pool: memoryview | PoolMemory,
        pages: int,
        page_size: int,
        strides: Strides | None = None,
        scales: F32 | None = None,
    ) -> None:
        """Captures the graphs over these pages; page 0 is written, all others stay as they are.

        May be called again with other pages, after every lane was released and every step collected.
        pool: memory of the device; a memoryview only where the device is the CPU. strides: where pages lie; None:
        [pages][layer][k, v][kv_head][token][head_dim]. scales: float32 [layers * 2 * kv_heads], for fp8 pages.
        """
        if page_size != self._limits.page_size:
            raise ValueError(
                f"the pool's pages hold {page_size} tokens, the runner was made for {self._limits.page_size}"
            )
        memory = self._host_memory(pool) if isinstance(pool, memoryview) else pool
        with self._platform.stream():
            self._use(memory, pages, strides, scales)

    def _host_memory(self, pool: memoryview) -> DeviceMemory:
        if self._platform.torch_device.type != "cpu":
            raise ValueError("a GPU cannot use pages in host memory")
        values = np.frombuffer(pool, np.uint8)
        return DeviceMemory(values.ctypes.data, values.nbytes, values)

    def _use(self, memory: PoolMemory, pages: int, strides: Strides | None, scales: F32 | None) -> None:
        strides = strides or page_major(self._spec, self._kv_dtype, self._limits.page_size)
        layout = page_layout(self._spec, self._kv_dtype, self._limits.page_size, strides)
        if memory.nbytes < pages * layout.page_bytes:
            raise ValueError(f"{memory.nbytes} bytes hold no {pages} pages of {layout.page_bytes}")
        if self._kv_dtype == "fp8_e4m3" and (scales is None or not len(scales)):
            scales = np.ones(self._spec.layers * 2 * self._spec.kv_heads, np.float32)
        self._pool = make_pool(memory, self._spec, strides, scales, self._platform.torch_device)
        self._copy = PageCopy(self._platform.device, layout)
        self._graphs.capture(
            self._platform, self.steps, self._decoder, self._lanes, self._pool, self._limits, self._spec.vocab_size
        )
        self._platform.synchronize()

    def pool_bytes(self, memory_fraction: float) -> int:
        """How much of the device is left for pages when the runner does its most: before `map_pool`.

        memory_fraction: of all the device's memory that may be in use, whoever uses it. What the weights, a step of the
        largest size and all graphs take is found by doing it, over a pool of a single page.
        """
        limits, spec = self._limits, self._spec
        longest = limits.max_batch_tokens - limits.max_rows + 1
        with self._platform.stream():
            strides = page_major(spec, self._kv_dtype, limits.page_size)
            page = torch.zeros(strides.page, dtype=torch.uint8, device=self._platform.torch_device)
            self._use(DeviceMemory(page.data_ptr(), strides.page, page), 1, strides, None)
            chunks = [
                Chunk(lane_on_page_0(slot, limits.table_entries), 0, count, count, True)
                for slot, count in enumerate([min(longest, limits.max_model_len)] + [1] * (limits.max_rows - 1))
            ]
            self._launch(self.steps.batch(chunks))
            self._platform.synchronize()
            free, total = self._platform.memory()
            self._graphs.clear()
            self._pool = self._copy = None
        return max(int(total * memory_fraction) - (total - free), 0)

    def prepare(self, lane: Lane, known: int) -> None:
        with self._platform.stream():
            self._lanes.prepare(lane, known)

    def release(self, lane: Lane) -> None:
        self._lanes.release(lane)

    def copy_slots(self, source: int, target: int, count: int) -> None:
        assert self._pool is not None and self._copy is not None, "map_pool() comes before the first copy"
        with self._platform.stream():
            self._uploads.copy(np.array([source, target, count, 0], np.int32), self._pairs)
            self._copy.copy_slots(self._pool.memory.address, self._pairs.data_ptr(), 1)
            self._platform.synchronize()

    def submit(self, chunks: list[Chunk]) -> Flight:
        batch = self._batch(chunks)
        with self._platform.stream():
            slot = self._replay(batch) or self._launch(batch)
            slot.results.copy_(self._decoder.results, non_blocking=True)
            slot.passed.record()
        return Flight(slot, batch)

    def collect(self, ticket: object) -> StepResult:
        assert isinstance(ticket, Flight)
        slot, batch = ticket
        slot.passed.wait()
        tokens, logprobs = np.zeros(batch.spans, np.uint32), np.zeros(batch.spans, np.float32)
        results = slot.results[:, : batch.spans].numpy()
        tokens[batch.order] = np.where(batch.samples, results[0], 0)
        logprobs[batch.order] = np.where(batch.samples, results[1].view(np.float32), 0)
        return StepResult(tokens, logprobs)

    def step(self, chunks: list[Chunk]) -> StepResult:
        return self.collect(self.submit(chunks))

    def logits(self, chunks: list[Chunk]) -> F32:
        batch = self._batch(chunks)
        pool, decoder, most = self._mapped(), self._decoder, self._limits.max_rows
        with self._platform.stream():
            slot, step = self.steps.stage(batch)
            normed = decoder.forward(step, pool)
            pieces = [decoder.head(normed[i : i + most]).float().cpu() for i in range(0, len(normed), most)]
            slot.passed.record()
        rows = torch.cat(pieces).numpy()
        firsts = {chunk: int(first) for chunk, first in zip(batch.order, batch.firsts, strict=True)}
        return np.concatenate([rows[firsts[i] : firsts[i] + chunk.count] for i, chunk in enumerate(chunks)])

    def close(self) -> None:
        self._platform.synchronize()
        self._graphs.clear()
        self._pool = self._copy = None

    def _mapped(self) -> Pool:
        assert self._pool is not None, "map_pool() comes before the first step"
        return self._pool

    def _batch(self, chunks: list[Chunk]) -> Batch:
        batch, limits = self.steps.batch(chunks), self._limits
        if batch.spans > limits.max_rows or batch.tokens > limits.max_batch_tokens:
            raise ValueError(
                f"a step of {batch.tokens} positions of {batch.spans} lanes; "
                f"the runner was made for {limits.max_batch_tokens} of {limits.max_rows}"
            )
        return batch

    def _replay(self, batch: Batch) -> Slot | None:
        """None: there is no graph for this step."""
        graph = self._graphs.fitting(batch.spans, bool(batch.prefixes)) if batch.is_decode else None
        if graph is None:
            return None
        slot = self.steps.stage_decodes(batch, graph.shape)
        graph.replay()
        return slot

    def _launch(self, batch: Batch) -> Slot:
        slot, step = self.steps.stage(batch)
        self._decoder.step(step, self._mapped())
        return slot
