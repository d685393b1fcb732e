"""transformers: `generate`, one request after another, the way it is used without a server."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from peers_lib.job import Job
from peers_lib.recording import Recording
from peers_lib.requestfile import Request
from peers_lib.trace import Trace
from peers_lib.worker import EngineError, main


class _Streamer:
    """What `generate` calls for the prompt first, then for every token. Duck-typed like its BaseStreamer."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._prompt = True

    def put(self, value: Any) -> None:
        if self._prompt:
            self._prompt = False
        else:
            self._recording.take(int(token) for token in value.reshape(-1))

    def end(self) -> None: ...


class Transformers:
    """In the worker's own process, with as many threads as torch chooses."""

    version = metadata.version("transformers")
    started: float | None = None

    def __init__(self, found_root: Callable[[int], None]) -> None:
        self.root = os.getpid()
        found_root(self.root)

    def start(self, job: Job) -> None:
        self._torch: Any = importlib.import_module("torch")
        library: Any = importlib.import_module("transformers")
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
        dtype = getattr(self._torch, job.dtype)
        try:
            self._model = library.AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).eval()
        except (OSError, ValueError) as error:
            raise EngineError(f"the model cannot be loaded: {error}") from error

    def prepare(self, requests: Sequence[Request]) -> bool:
        return False

    def run(self, requests: Sequence[Request], timeout: float) -> list[Trace]:
        # Those at the end of the queue wait for all before them.
        start = time.monotonic()
        recordings = [Recording(request.id, start + request.at) for request in requests]
        for request, recording in zip(requests, recordings, strict=True):
            time.sleep(max(recording.submitted - time.monotonic(), 0.0))
            self._generate(request, recording)
        return [recording.trace() for recording in recordings]

    def _generate(self, request: Request, recording: Recording) -> None:
        if request.ignore_eos:
            self._model.generation_config.eos_token_id = None
        prompt = self._torch.tensor([request.prompt_token_ids])
        self._model.generate(
            prompt,
            attention_mask=self._torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=request.max_tokens,
            pad_token_id=0,
            streamer=_Streamer(recording),
        )

    def stop(self) -> None: ...


if __name__ == "__main__":
    main(Transformers)
