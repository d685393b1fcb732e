"""Sampling: filters, noise and log-probabilities of all rows of a step, in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from kernels.cuda.device import Device, Grid, address

LogitsDtype = Literal["float32", "bfloat16", "float16"]

# Of one lane, as `struct Sampling` in sampling.cu. Off: temperature 1 (0: greedy), top_p 1, repetition 1, else 0.
SAMPLING: Final = np.dtype(
    [
        ("seed", "<u8"),
        ("temperature", "<f4"),
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        ("top_k", "<u4"),
        ("repetition", "<f4"),  # over prompt and output
        ("presence", "<f4"),  # over the output
        ("frequency", "<f4"),
        ("output_index", "<u4"),
        ("prompt_length", "<u4"),
        ("min_tokens", "<u4"),
        ("bias_first", "<u4"),  # in the arrays that all lanes share
        ("bias_count", "<u4"),
        ("suppressed_first", "<u4"),
        ("suppressed_count", "<u4"),
        ("flags", "<u4"),
        ("unused", "<u4"),
    ]
)
WANT_LOGPROB: Final = 1  # of `flags`

MAX_VOCAB: Final = 1 << 19  # as many weights as 64-bit sums hold

_C_TYPES: Final[dict[LogitsDtype, str]] = {"float32": "float", "bfloat16": "bf16", "float16": "f16"}
_TICKET_BYTES: Final = 32
_PARTIAL_BYTES: Final = 32
_NOISE_THREADS: Final = 256


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a row is divided. None of it changes a token."""

    threads: int = 1024
    range_tokens: int = 16384  # of the vocabulary, for each of a row's blocks
    listed: int = 2048  # tokens that go on in shared memory, once no more are left


class Sampler:
    """Samples from logits [rows, vocab] of one dtype as `kernels.reference.sample` does, whatever else is in the step.

    Everything is given by address. The log-probability of a token is that under the logits as given.
    Raises ValueError for a vocab below 1 or above 2^19.
    """

    def __init__(self, device: Device, vocab: int, logits_dtype: LogitsDtype, geometry: Geometry | None = None) -> None:
        if not 0 < vocab <= MAX_VOCAB:
            raise ValueError(f"a vocabulary of {vocab} tokens; 1 to {MAX_VOCAB} are possible")
        geometry = geometry or Geometry()
        self._vocab = vocab
        self._ranges = -(-vocab // geometry.range_tokens)
        used = _TICKET_BYTES + self._ranges * _PARTIAL_BYTES + vocab * 4
        self._row_bytes = -(-used // 32) * 32
        defines: dict[str, int | str] = {
            "LOGIT": _C_TYPES[logits_dtype],
            "THREADS": geometry.threads,
            "RANGE": geometry.range_tokens,
            "LISTED": geometry.listed,
        }
        self._sample = device.kernel("sampling.cu", "sample", defines, geometry.threads)
        self._noise = device.kernel("sampling.cu", "sampling_noise", defines, _NOISE_THREADS)

    def scratch_bytes(self, rows: int) -> int:
        """Of the scratch for up to so many rows: 32-byte aligned, zeroed once and then kept as launches leave it."""
        return rows * self._row_bytes

    def launch(
        self,
        *,
        logits: int,
        row_stride: int,
        samples: int,
        params: int,
        bias_ids: int,
        bias_values: int,
        suppressed_ids: int,
        history: int,
        history_stride: int,
        scratch: int,
        tokens_out: int,
        logprobs_out: int,
        rows: int,
    ) -> None:
        """Draws the token of each valid row; others are left alone. Two valid rows have different lanes.

        logits: [rows, row_stride], the first vocab of each row.
        samples: int32 [rows, 4] of {lane, position of the new token, valid, 0}.
        params: SAMPLING [lanes].
        bias_ids uint32, bias_values float32, suppressed_ids uint32: of all lanes, one behind the other; the ids of one
        lane are distinct. Ids outside the vocabulary are ignored, here and in the history.
        history: int32 [lanes, history_stride], by position: prompt and output before the new token are read, the new
        token is written.
        tokens_out: int32 [rows]. logprobs_out: float32 [rows], 0 where the flags do not ask for it.
        """
        arguments = (
            address(logits),
            np.int64(row_stride),
            address(samples),
            address(params),
            address(bias_ids),
            address(bias_values),
            address(suppressed_ids),
            address(history),
            np.int64(history_stride),
            address(scratch),
            np.int64(self._row_bytes),
            address(tokens_out),
            address(logprobs_out),
            np.uint32(self._vocab),
        )
        self._sample.launch(Grid(self._ranges, rows), arguments)

    def noise(self, seed: int, position: int, index: int, first: int, count: int, words: int, values: int) -> None:
        """The noise alone, to check a device: of tokens from `first` on, words u32 and values f32 [count]."""
        grid = Grid(-(-count // _NOISE_THREADS))
        counter = (np.uint64(seed), np.uint32(position), np.uint32(index), np.uint32(first), np.uint32(count))
        self._noise.launch(grid, (*counter, address(words), address(values)))
