"""Other engines' paged attention over the same memory, laid out as they are made for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from gpu.bed import Launch
from gpu.job import Job
from gpu.pool import Pool, expected

_WORKSPACE: Final = 256 << 20
_CHECKED: Final = 64  # queries
_TOLERANCE: Final = 0.1  # of fp8 with 8-bit probabilities; a wrong argument is off by far more


@dataclass(frozen=True, slots=True)
class Case:
    """One launch: sequences whose last `counts` tokens are the queries.

    queries: [sum of counts, heads, head_dim], bfloat16. tables: int32 [sequences, pages]. contexts, counts: int64.
    """

    queries: torch.Tensor
    tables: np.ndarray
    contexts: np.ndarray
    counts: np.ndarray

    @property
    def query_starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)


class Peer(ABC):
    """Prepares a case outside the timed part; a launch reads one layer."""

    name: str

    @abstractmethod
    def prepare(self, case: Case, pool: Pool) -> Any:
        """What all layers share: plans, metadata, tables on the device."""

    @abstractmethod
    def run(self, prepared: Any, case: Case, pool: Pool, layer: int) -> torch.Tensor:
        """[sum of counts, heads, head_dim]."""

    def launches(self, case: Case, pool: Pool, layers: range) -> list[Launch]:
        """Raises AssertionError where the answer is wrong: a peer that is called wrongly is no peer."""
        prepared = self.prepare(case, pool)
        found = self.run(prepared, case, pool, 0)
        end = int(case.counts[0])
        mine = slice(max(0, end - _CHECKED), end)
        keys_values = pool.peer_keys_values(0)
        wanted = expected(case.queries[mine], *keys_values, case.tables[0], int(case.contexts[0]))
        error = float((found[mine].double() - wanted).norm() / wanted.norm())
        assert error < _TOLERANCE, f"{self.name} is off by {error:.2g}: it was called wrongly"
        return [partial(self.run, prepared, case, pool, layer) for layer in layers]


class FlashAttention3(Peer):
    """The operators of a library that registers `flash_attn_3` or vLLM's `_vllm_fa3_C`."""

    name = "fa3"

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library))
        spaces = [getattr(torch.ops, name) for name in ("_vllm_fa3_C", "flash_attn_3")]
        self.ops = next(space for space in spaces if hasattr(space, "fwd"))

    def prepare(self, case: Case, pool: Pool) -> dict[str, Any]:
        device, shape = case.queries.device, pool.shape
        fp8 = shape.dtype == torch.float8_e4m3fn
        queries = case.queries.to(shape.dtype) if fp8 else case.queries
        lengths = torch.from_numpy(case.contexts.astype(np.int32)).to(device)
        common = {
            "seqused_k": lengths,
            "cu_seqlens_q": torch.from_numpy(case.query_starts).to(device),
            "max_seqlen_q": int(case.counts.max()),
            "max_seqlen_k": int(case.contexts.max()),
            "is_causal": True,
            "window_size_left": -1,
            "window_size_right": -1,
            "attention_chunk": 0,
            "num_splits": 0,
            "sm_margin": 0,
        }
        sizes = {
            "batch_size": len(case.contexts),
            "num_heads": queries.shape[1],
            "num_heads_k": shape.kv_heads,
            "headdim": shape.head_dim,
            "headdim_v": shape.head_dim,
            "qkv_dtype": queries.dtype,
            "page_size": shape.page_size,
            "max_seqlen_k_new": 0,
            "has_softcap": False,
        }
        return common | {
            "q": queries,
            "page_table": torch.from_numpy(case.tables).to(device),
            "softmax_scale": shape.head_dim**-0.5,
            "softcap": 0.0,
            "is_rotary_interleaved": True,
            "scheduler_metadata": call_by_name(self.ops.get_scheduler_metadata, common | sizes),
            "cp_world_size": 1,
            "cp_rank": 0,
        }

    def run(self, prepared: dict[str, Any], case: Case, pool: Pool, layer: int) -> torch.Tensor:
        keys, values = pool.peer_keys_values(layer)
        found = call_by_name(self.ops.fwd, prepared | {"k": keys, "v": values})
        output: torch.Tensor = found[0]
        return output


class FlashInfer(Peer):
    """Its decode wrapper on tensor cores, its prefill wrapper for longer chunks."""

    name = "flashinfer"

    def __init__(self) -> None:
        self.module = import_module("flashinfer")

    def prepare(self, case: Case, pool: Pool) -> Any:
        device, shape = case.queries.device, pool.shape
        pages = -(-case.contexts // shape.page_size)
        starts = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
        ids = case.tables[np.arange(case.tables.shape[1]) < pages[:, None]]
        last = (case.contexts - (pages - 1) * shape.page_size).astype(np.int32)
        lists = [torch.from_numpy(array).to(device) for array in (starts, ids, last)]
        sizes = (case.queries.shape[1], shape.kv_heads, shape.head_dim, shape.page_size)
        types = {"q_data_type": case.queries.dtype, "kv_data_type": shape.dtype}
        space = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
        if case.counts.max() == 1:
            wrapper = self.module.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
            wrapper.plan(*lists, *sizes, **types)
        else:
            wrapper = self.module.BatchPrefillWithPagedKVCacheWrapper(space, "NHD")
            wrapper.plan(torch.from_numpy(case.query_starts).to(device), *lists, *sizes, causal=True, **types)
        return wrapper

    def run(self, prepared: Any, case: Case, pool: Pool, layer: int) -> torch.Tensor:
        output: torch.Tensor = prepared.run(case.queries, pool.peer_keys_values(layer))
        return output


def call_by_name(operator: Any, given: dict[str, Any]) -> Any:
    """Calls a torch operator whose arguments differ from version to version.

    Arguments that are not given are None where they may be, else their default. Raises ValueError for one that
    has neither.
    """
    arguments = {}
    for argument in operator.default._schema.arguments:
        if argument.name in given:
            arguments[argument.name] = given[argument.name]
        elif argument.has_default_value():
            arguments[argument.name] = argument.default_value
        elif "Optional" in str(argument.type):
            arguments[argument.name] = None
        else:
            raise ValueError(f"{operator} wants {argument.name}, which is not known here")
    return operator(**arguments)


def available(fa3: Path | None) -> tuple[list[Peer], list[str]]:
    """Peers, and why others are missing."""
    peers: list[Peer] = []
    missing = []
    if fa3 is None:
        missing.append("FlashAttention-3: --fa3 names no library")
    else:
        try:
            peers.append(FlashAttention3(fa3))
        except (OSError, StopIteration) as error:
            missing.append(f"FlashAttention-3: {error or 'the library registers none of its operators'}")
    try:
        peers.append(FlashInfer())
    except ImportError as error:
        missing.append(f"FlashInfer: {error}")
    return peers, missing


def peer_seconds(job: Job, peer: Peer, case: Case, pool: Pool, layers: range) -> float | None:
    """Device time of one launch; None where it cannot do this case, which is noted."""
    try:
        return job.bed.seconds(peer.launches(case, pool, layers))
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        job.note_once(f"{peer.name}, {str(pool.shape.dtype).removeprefix('torch.')}: {lines[0][:200]}")
        return None
