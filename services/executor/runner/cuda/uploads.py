"""Copies to the device in stream order, without waiting for the stream: a ring of pinned buffers."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from services.executor.runner.cuda.platform import Platform

_BUFFERS: Final = 64  # a few for each lane that is admitted while a step runs


class Uploads:
    """nbytes: the most that one copy may hold. Used inside the platform's stream."""

    def __init__(self, platform: Platform, nbytes: int, buffers: int = _BUFFERS) -> None:
        self._buffers = [platform.pinned(nbytes) for _ in range(buffers)]
        self._events = [platform.event() for _ in range(buffers)]
        self._next = 0

    def copy(self, data: np.ndarray, target: torch.Tensor) -> None:
        """data: contiguous, of any type. target: contiguous, at least as many bytes, whose first ones are written."""
        if not data.nbytes:
            return
        buffer, event = self._buffers[self._next], self._events[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        event.wait()  # until the copy that read this buffer last has passed
        source = buffer[: data.nbytes]
        source.numpy()[:] = data.reshape(-1).view(np.uint8)
        target.view(-1).view(torch.uint8)[: data.nbytes].copy_(source, non_blocking=True)
        event.record()
