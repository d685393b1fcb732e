"""What the device knows of each lane: its tokens, and how they are sampled.

A lane holds a slot from the first `prepare` to `release`. The host uploads the tokens that it knows at the first
`prepare`; from then on the sampler appends, so a step may be enqueued before the host has seen the token it starts
from. Everything goes down the one stream: a slot that is given away while a step still reads it is overwritten
only after that step.

Slot 0 is nobody's: the padded positions of a graph read and write there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from kernels.cuda.sampling import SAMPLING, WANT_LOGPROB
from services.executor.runner.base import Lane
from services.executor.runner.cuda.platform import Platform
from services.executor.runner.cuda.uploads import Uploads

# As many as the frontend lets through; stop tokens come with the model's own end tokens.
MOST_BIASES: Final = 4096
MOST_SUPPRESSED: Final = 2048

_WORDS: Final = 2 * MOST_BIASES + MOST_SUPPRESSED  # of a slot: biased ids, their values, suppressed ids


@dataclass(slots=True)
class Prepared:
    """A lane's slot, and its block table as page ids."""

    slot: int
    pages: npt.NDArray[np.int32]  # [entries], strided: the low halves of the row's entries, in place


class Lanes:
    """slots: lanes that may be prepared at once. max_model_len: tokens that a lane may hold."""

    def __init__(self, platform: Platform, slots: int, max_model_len: int) -> None:
        device = platform.torch_device
        self.stride: Final = max_model_len + 1  # the last position is sampled, and never fed
        self.history = torch.zeros(slots + 1, self.stride, dtype=torch.int32, device=device)
        self.params = torch.zeros(slots + 1, SAMPLING.itemsize, dtype=torch.uint8, device=device)
        self.lists = torch.zeros(slots + 1, _WORDS, dtype=torch.int32, device=device)
        neutral = np.zeros(slots + 1, SAMPLING)
        neutral["top_p"] = neutral["repetition"] = 1.0
        self.params.copy_(torch.from_numpy(neutral.view(np.uint8).reshape(slots + 1, -1)))
        self._uploads = Uploads(platform, 4 * max(self.stride, _WORDS))
        self._free = list(range(slots, 0, -1))

    def prepare(self, lane: Lane, known: int) -> None:
        """Raises RuntimeError when every slot is taken. Inside the platform's stream."""
        if lane.row is None:
            raise ValueError("the lane has no row")
        pages = lane.row.view(np.int32)[::2]
        if isinstance(lane.device, Prepared):
            lane.device.pages = pages
            return
        if not self._free:
            raise RuntimeError("more lanes are prepared than the runner was made for")
        slot = self._free.pop()
        lane.device = Prepared(slot, pages)
        self._uploads.copy(lane.tokens[:known], self.history[slot])
        self._upload_sampling(lane, slot)

    def scribble(self, seed: int, positions: int, vocab: int) -> None:
        """Fills the first positions with tokens that depend on `seed`: for warm-up, while no lane is prepared."""
        assert len(self._free) == len(self.history) - 1, "a lane is prepared, and its tokens would be lost"
        device = self.history.device
        rows, columns = torch.arange(len(self.history), device=device), torch.arange(positions, device=device)
        tokens = (rows[:, None] * 7919 + columns * 31 + seed * 104729) % vocab
        self.history[:, :positions] = tokens.to(torch.int32)

    def release(self, lane: Lane) -> None:
        if isinstance(lane.device, Prepared):
            self._free.append(lane.device.slot)
            lane.device = None

    def _upload_sampling(self, lane: Lane, slot: int) -> None:
        asked = lane.sampling
        biases, suppressed = asked.logit_bias, tuple(dict.fromkeys(asked.suppressed))
        if len(biases) > MOST_BIASES or len(suppressed) > MOST_SUPPRESSED:
            raise ValueError(f"more than {MOST_BIASES} biases or {MOST_SUPPRESSED} suppressed tokens")
        params = np.zeros(1, SAMPLING)
        params["seed"] = asked.seed
        params["temperature"] = asked.temperature
        params["top_p"] = asked.top_p
        params["min_p"] = asked.min_p
        params["top_k"] = asked.top_k
        params["repetition"] = asked.repetition_penalty
        params["presence"] = asked.presence_penalty
        params["frequency"] = asked.frequency_penalty
        params["output_index"] = lane.index
        params["prompt_length"] = lane.prompt_length
        params["min_tokens"] = asked.min_tokens
        params["bias_first"] = slot * _WORDS
        params["bias_count"] = len(biases)
        params["suppressed_first"] = slot * _WORDS
        params["suppressed_count"] = len(suppressed)
        params["flags"] = WANT_LOGPROB if asked.logprobs else 0
        self._uploads.copy(params, self.params[slot])
        lists = self.lists[slot]
        if biases:
            ids, values = zip(*biases, strict=True)
            self._uploads.copy(np.array(ids, np.uint32), lists)
            self._uploads.copy(np.array(values, np.float32), lists[MOST_BIASES:])
        if suppressed:
            self._uploads.copy(np.array(suppressed, np.uint32), lists[2 * MOST_BIASES :])

    @property
    def bias_ids(self) -> int:
        """Address of the array that `bias_first` of every lane indexes; the two below likewise."""
        return self.lists.data_ptr()

    @property
    def bias_values(self) -> int:
        return self.lists.data_ptr() + 4 * MOST_BIASES

    @property
    def suppressed_ids(self) -> int:
        return self.lists.data_ptr() + 8 * MOST_BIASES
